"""Micrographs: what one shows, and whether a stream of them has changed."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from grainwatch.messages.common import ArrayData, FrameKey, FrameResult, Message, ModelInfo


class ImageStatistics(msgspec.Struct, frozen=True):
    """How bright, how contrasted, how sharp a micrograph is, before its histogram was matched.

    Attributes
    ----------
    mean, std : float
        Of the pixels as they came: shares of `full_scale`, or in their own unit where that is None.
    entropy_bits : float
        Of the histogram of 256 greys.
    sharpness : float
        Per pixel: gradient of the sharpest edges over the contrast; 1 / sharpness is about their width.
    dark_share, bright_share : float
        Of pixels at the ends of what the detector could say; where `full_scale` is None, at the smallest and
        the largest value of the image.
    full_scale : float or None
        Largest value of the pixels' type: 255, 65535, or 1 of one bit. None for floating-point and other
        types, whose values nothing bounds.
    """

    mean: float
    std: float
    entropy_bits: float
    sharpness: float
    dark_share: float
    bright_share: float
    full_scale: float | None = None


class PatchGrid(msgspec.Struct, frozen=True):
    """The squares of an image that networks looked at.

    Attributes
    ----------
    size_px, stride_px : int
    origin_px : (int, int)
        Row and column of the first one, in the image as it came.
    shape : (int, int)
        How many fit, down and across.
    numbers : ArrayData, (n,) int32
        Those that were looked at, row by row; all of them where the image is not too large.
    """

    size_px: int
    stride_px: int
    origin_px: tuple[int, int]
    shape: tuple[int, int]
    numbers: ArrayData


class Fingerprint(msgspec.Struct, frozen=True):
    """What one network makes of an image, patch by patch, taken together.

    Attributes
    ----------
    model : ModelInfo
    kind : str
        "vqvae": means of the encoder's vectors; "vae": the latent means mu.
    vector : ArrayData, (d,) float32
        Mean over the patches.
    spread : ArrayData, (d,) float32
        Standard deviation over the patches; NaN with fewer than two.
    codes : ArrayData, (n, rows, columns) uint16, or None
        Of a VQ-VAE: the codebook entry of each 8 x 8 px of each patch.
    codebook : int
        Entries of the codebook; 0 without one.
    whitened : ArrayData, (k,) float32, or None
        `vector` in standard deviations of the training patches, along their main directions: what distances
        between images are measured in. None where the model does not have these.
    """

    model: ModelInfo
    kind: str  # "vqvae" | "vae"
    vector: ArrayData
    spread: ArrayData
    codes: ArrayData | None = None
    codebook: int = 0
    whitened: ArrayData | None = None


class PhaseMorphology(msgspec.Struct, frozen=True):
    """What one phase of a two-phase micrograph looks like.

    Attributes
    ----------
    phase : str
        "bright" or "dark".
    threshold : int
        Otsu's: grey levels (of 256) above it are bright; 255 for an image of one grey.
    separability : float
        Otsu's eta: 1 for two levels.
    doubtful : float
        Share of pixels that are so near the threshold that they may belong to either phase.
    fraction, fraction_spread : float
        Share of the phase; standard deviation over the patches (NaN with fewer than two). Both are NaN for an
        image of one grey, which may be either phase.
    free_path_rows_px, free_path_columns_px : float
        Mean free path V_f / (N_L I_u) along rows and along columns; NaN without a boundary that way.
    free_path_px, free_path_spread_px : float
        Their mean, and the standard deviation over the patches.
    free_path_um, free_path_spread_um : float or None
        The same in um; None where the pixel size is unknown.
    chords : (float, float)
        Grains that were met along rows and along columns.
    patches : int
        That the spreads are taken over.
    flags : tuple of str
        "no_phase_boundary", "unclear_phases" (the grey levels hardly part).
    """

    phase: str
    threshold: int
    separability: float
    doubtful: float
    fraction: float
    fraction_spread: float
    free_path_rows_px: float
    free_path_columns_px: float
    free_path_px: float
    free_path_spread_px: float
    free_path_um: float | None
    free_path_spread_um: float | None
    chords: tuple[float, float]
    patches: int
    flags: tuple[str, ...] = ()


class ProcessPosterior(msgspec.Struct, frozen=True):
    """How likely each process condition is, if it is one of them.

    Attributes
    ----------
    quantity : str
        "ln_cooling_rate", or whatever the labels of the training images were called.
    candidates : tuple of str
        Conditions that were tried.
    values : tuple of float
        The same as numbers; empty for classes.
    probability : tuple of float
        Calibrated on held-out images, flat prior; they add up to 1.
    log_likelihood : tuple of float
        Nats per patch of the code map under each, as the network says it.
    mean, sigma : float or None
        Of `values` under `probability`; None for classes.
    typicality : float
        Share of held-out images of the trained conditions that fit their best condition as badly, or worse.
    none_of_these : bool
        `typicality` is below the level that the bundle states (0.05): nothing above should be believed.
    patches : int
        That it rests on.
    """

    quantity: str
    candidates: tuple[str, ...]
    values: tuple[float, ...]
    probability: tuple[float, ...]
    log_likelihood: tuple[float, ...]
    mean: float | None
    sigma: float | None
    typicality: float
    none_of_these: bool
    patches: int


class Novelty(msgspec.Struct, frozen=True):
    """Whether an image looks like those that the model was trained on.

    Attributes
    ----------
    typicality : float
        Share of held-out images of the trained kind that are as strange, or stranger: uniform from 0 to 1 for
        more of the same.
    novel : bool
        `typicality` is below `level`.
    level : float
        So many images of the trained kind are called novel.
    latent_distance : float
        Mean distance of the patches to the nearest training patches, in standard deviations of patches.
    image_distance : float
        Of their mean from those of the training images, in standard deviations of images.
    code_divergence_bits : float or None
        Jensen-Shannon divergence of the code histogram from the nearest one that has what those of the
        training images have in common; None without codes.
    bits_per_code : float or None
        What the PixelCNN needs for the code map, under the best condition; None without one.
    """

    typicality: float
    novel: bool
    level: float
    latent_distance: float
    image_distance: float
    code_divergence_bits: float | None = None
    bits_per_code: float | None = None


class Neighbour(msgspec.Struct, frozen=True):
    """An earlier image of the stream that looks alike: its key, and how far its fingerprint is away."""

    key: FrameKey
    distance: float


class MicrographResult(FrameResult, frozen=True, tag="grainwatch.micrograph/1", kw_only=True):
    """What one micrograph shows.

    Attributes
    ----------
    shape_px : (int, int)
        Rows and columns as it came.
    data_bar_px : int
        Rows that were cut off at the bottom, because they are a data bar.
    pixel_size_um : float or None
        None where nobody says it: then lengths are in px only, and the flag "pixel_size_unknown" is there.
    instrument : str
        Vendor, microscope and detector as far as they are known; "" where they are not.
    statistics : ImageStatistics or None
        None where there is nothing but a data bar.
    patches : PatchGrid or None
        None where not even one fits.
    fingerprints : tuple of Fingerprint
        One for each network; the first one is what `novelty` and `neighbours` rest on.
    morphology : PhaseMorphology or None
    posterior : ProcessPosterior or None
        None without a PixelCNN that knows conditions.
    novelty : Novelty or None
    neighbours : tuple of Neighbour
        The nearest first, among the last 10,000 images that the stream has shown to the same model.
    remarks : tuple of str
        What `flags` mean here, in words: which place says which pixel size, what is out of domain.
    """

    SCHEMA: ClassVar[str] = "grainwatch.micrograph/1"

    shape_px: tuple[int, int]
    data_bar_px: int = 0
    pixel_size_um: float | None = None
    instrument: str = ""
    statistics: ImageStatistics | None = None
    patches: PatchGrid | None = None
    fingerprints: tuple[Fingerprint, ...] = ()
    morphology: PhaseMorphology | None = None
    posterior: ProcessPosterior | None = None
    novelty: Novelty | None = None
    neighbours: tuple[Neighbour, ...] = ()
    remarks: tuple[str, ...] = ()


class ChangeReport(Message, frozen=True, tag="grainwatch.change/1", kw_only=True):
    """What the drift alarm of a stream of micrographs knows: every ten images, and when `state` changes.

    Attributes
    ----------
    source, series_uid, frame, channel
        The image, as in `FrameKey`.
    state : str
        "learning" while too few images were seen; "same"; "changed" after an alarm, until the alarm begins
        anew with another configuration or a restart.
    images : int
        Since it began.
    statistic, limit : float
        What is compared: above `limit` is an alarm.
    images_between_false_alarms : float
        Mean number of images of a stream that does not change until it is called changed.
    components : tuple of str
        What is followed.
    change : tuple of float
        How far each moved lately, in standard deviations of single images.
    foremost : str
        The component that moved most.
    correlated : bool
        Images resemble those just before: false alarms are more frequent than stated.
    alarm_series_uid, alarm_frame
        Where the alarm was raised; "" and -1 without one.
    text : str
        The same in words, with what to do.
    """

    SCHEMA: ClassVar[str] = "grainwatch.change/1"

    source: str
    series_uid: str
    frame: int
    channel: str = ""
    state: str  # "learning" | "same" | "changed"
    images: int
    statistic: float
    limit: float
    images_between_false_alarms: float
    components: tuple[str, ...]
    change: tuple[float, ...]
    foremost: str
    correlated: bool
    alarm_series_uid: str = ""
    alarm_frame: int = -1
    text: str = ""
