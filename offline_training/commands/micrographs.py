"""``grainwatch train vae``, ``vqvae`` and ``pixelcnn``: bundles from images."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grainwatch import __version__
from offline_training.commands.common import ProgressLine, Seed, duration, need_torch, plainly, table

if TYPE_CHECKING:
    from offline_training.micrograph.bundles import Made, Watching
    from offline_training.micrograph.recipes import Kind

Images = Annotated[
    str, typer.Option("--images", help="Folder of images (png, jpg, tif, bmp); or synthetic, synthetic:N.")
]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels", help="CSV file: column file; group or source; and numbers or a class as condition."
    ),
]
Label = Annotated[
    list[str] | None, typer.Option("--label", help="Column of --labels to take as condition. Again for more.")
]
Group = Annotated[
    str, typer.Option("--group", help="Regular expression: what it finds in a file's name is its group.")
]
HeldOut = Annotated[
    list[str] | None,
    typer.Option("--held-out", help="Group to hold out; a fifth of them by default. Again for more."),
]
PixelSize = Annotated[
    float | None, typer.Option("--pixel-size-um", min=1e-6, help="Of images that do not say it.")
]
PatchPx = Annotated[int, typer.Option("--patch-px", help="Side of a patch.")]
MedianPx = Annotated[int, typer.Option("--median-px", help="Side of the median filter; 1: none.")]
Match = Annotated[
    bool,
    typer.Option(
        "--match", help="Match histograms to that of a training image. All then have the same fraction."
    ),
]
PhaseName = Annotated[str, typer.Option("--phase", help="Phase that is measured: bright or dark.")]
AsTheyAre = Annotated[
    bool, typer.Option("--as-they-are", help="Do not mirror and turn crops: a direction means something.")
]
Overlaps = Annotated[
    bool, typer.Option("--overlaps/--no-overlaps", help="Take images of the same place as one group.")
]
Recipe = Annotated[str, typer.Option("--recipe", help="By name; the first one of the kind by default.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a number of the recipe. Again for more."),
]
Steps = Annotated[int, typer.Option("--steps", help="Batches; the learning rate falls until the last.")]
Minutes = Annotated[
    float, typer.Option("--minutes", min=0.0, help="End training early after so long; 0: never.")
]
Cores = Annotated[int, typer.Option("--cores", min=1, help="Cores that run the network.")]
Name = Annotated[str, typer.Option("--name", help="Of the model; that of the folder by default.")]
Version = Annotated[str, typer.Option("--version", help="Of the model; grainwatch's by default.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the bundle; checkpoint and pictures, too.")]


def vqvae(
    images: Images,
    out: Out,
    labels: Labels = None,
    label: Label = None,
    group: Group = "",
    held_out: HeldOut = None,
    pixel_size_um: PixelSize = None,
    patch_px: PatchPx = 128,
    median_px: MedianPx = 3,
    match: Match = False,
    phase: PhaseName = "bright",
    as_they_are: AsTheyAre = False,
    overlaps: Overlaps = True,
    recipe: Recipe = "",
    set_: Set = None,
    steps: Steps = 2000,
    minutes: Minutes = 0.0,
    seed: Seed = 0,
    cores: Cores = 2,
    name: Name = "",
    version: Version = "",
) -> None:
    """Train a VQ-VAE: patches of micrographs as maps of codes; go on where an interrupted run stopped."""
    given = dict(locals())
    need_torch()
    line = ProgressLine()
    with plainly():
        from offline_training.micrograph.bundles import make_vqvae

        made = make_vqvae(_request("vqvae", given), out, _watching(line, cores))
    line.end()
    _written(made, out)
    f = made.metrics["held_out"]
    print(f"  held-out patches by codes: {f['psnr_dB']:.2f} dB")
    print(
        f"    average pooling at the same length: {f['pooling_psnr_dB']:.2f} dB;"
        f" one grey: {f['mean_psnr_dB']:.2f} dB"
    )
    codes = made.metrics["codes"]
    print(f"  codes met: {f['codes_alive']} of {codes}, as good as {f['perplexity']:.0f} equal ones")
    _judged(made)


def vae(
    images: Images,
    out: Out,
    into: Annotated[
        Path | None, typer.Option("--into", help="Bundle of a VQ-VAE; the new bundle has both networks.")
    ] = None,
    labels: Labels = None,
    label: Label = None,
    group: Group = "",
    held_out: HeldOut = None,
    pixel_size_um: PixelSize = None,
    patch_px: PatchPx = 128,
    median_px: MedianPx = 3,
    match: Match = False,
    phase: PhaseName = "bright",
    as_they_are: AsTheyAre = False,
    overlaps: Overlaps = True,
    recipe: Recipe = "",
    set_: Set = None,
    steps: Steps = 2000,
    minutes: Minutes = 0.0,
    seed: Seed = 0,
    cores: Cores = 2,
    name: Name = "",
    version: Version = "",
) -> None:
    """Train a VAE: patches of micrographs as vectors; go on where an interrupted run stopped.

    With --into, --patch-px, --median-px, --match and --phase are those of that bundle.
    """
    given = dict(locals())
    need_torch()
    line = ProgressLine()
    with plainly():
        from offline_training.micrograph.bundles import make_vae
        from pipelines.engines.bundle import load_bundle

        base = None if into is None else load_bundle(into)
        made = make_vae(_request("vae", given, base), out, base, _watching(line, cores))
    line.end()
    _written(made, out)
    f = made.metrics["held_out"]
    print(f"  held-out patches by their vectors: {f['psnr_dB']:.2f} dB")
    print(
        f"    as many principal components: {f['pca_psnr_dB']:.2f} dB; average pooling to as many numbers:"
        f" {f['pooling_psnr_dB']:.2f} dB; one grey: {f['mean_psnr_dB']:.2f} dB"
    )
    print(f"  latent numbers used: {f['used']}; {f['kl_nats']:.1f} nats a patch")
    print(f"    least sigma: {f['least_deviation']:.3f}")
    _judged(made)


def pixelcnn(
    images: Images,
    out: Out,
    vqvae_: Annotated[Path, typer.Option("--vqvae", help="Bundle of the VQ-VAE whose codes are learned.")],
    labels: Labels = None,
    label: Label = None,
    group: Group = "",
    held_out: HeldOut = None,
    pixel_size_um: PixelSize = None,
    as_they_are: AsTheyAre = False,
    overlaps: Overlaps = True,
    candidates: Annotated[
        int, typer.Option("--candidates", min=2, max=24, help="Conditions to weigh over a range of a number.")
    ] = 7,
    drawn: Annotated[
        int, typer.Option("--drawn", min=16, help="Patches to draw for each condition that is compared.")
    ] = 96,
    recipe: Recipe = "",
    set_: Set = None,
    steps: Steps = 2000,
    minutes: Minutes = 0.0,
    seed: Seed = 0,
    cores: Cores = 2,
    name: Name = "",
    version: Version = "",
) -> None:
    """Train a PixelCNN: how likely maps of codes are under a process condition.

    The new bundle has all that --vqvae has. Images are prepared, and held out, as for that.
    """
    given = dict(locals()) | {"into": vqvae_}
    need_torch()
    line = ProgressLine()
    with plainly():
        from offline_training.micrograph.priors import PriorOptions, make_prior, table_of
        from pipelines.engines.bundle import load_bundle

        base = load_bundle(vqvae_)
        options = PriorOptions(candidates, drawn)
        made = make_prior(_request("pixelcnn", given, base), base, out, options, _watching(line, cores))
        generated = table_of(made.metrics["generated"])
    line.end()
    _written(made, out)
    f = made.metrics["held_out"]
    print(f"  held-out maps: {f['bits']:.3f} bits a code")
    print(f"    order 0: {f['order_0_bits']:.3f}; four neighbours before: {f['context_bits']:.3f}")
    if not math.isnan(f["wrong_condition_bits"]):
        print(f"    under wrong conditions: {f['wrong_condition_bits']:.3f}")
    _judged(made)
    if generated[1]:
        print("  patches, mean ± spread; W1 is the distance of generated from held-out ones")
        print("\n".join(f"    {row}" for row in table(*generated).splitlines()))
    if law := made.metrics["inverse"]:
        over = law["range"][1] - law["range"][0]
        for what, found in (("a patch", law), ("an image", law["images"])):
            print(
                f"  the condition from fraction and free path of {what}: 90 % intervals hold"
                f" {100 * found['holds_the_true_one']:.0f} % (width {found['median_width']:.2f} of"
                f" {over:.2f}); off by {found['rms_error']:.2f}, a guess by {found['guess_rms_error']:.2f}"
            )


def _request(kind: Kind, given: dict[str, Any], base: Any = None) -> Any:
    from offline_training.loop import use_cores
    from offline_training.micrograph.bundles import Naming, Request
    from offline_training.micrograph.data import DataRequest
    from offline_training.micrograph.recipes import recipe_of
    from offline_training.micrograph.training import TrainingSettings

    phase = given.get("phase", "bright")
    if phase not in ("bright", "dark"):
        raise ValueError(f"--phase {phase}: expected bright or dark")
    # Crops are made by the thread that trains: all cores are the network's.
    use_cores(given["cores"] + 1)
    data = DataRequest(
        images=given["images"],
        labels=given["labels"],
        wanted=tuple(given["label"] or ()),
        group=given["group"],
        held_out=tuple(given["held_out"] or ()),
        pixel_size_um=given["pixel_size_um"],
        patch_px=given.get("patch_px", 128),
        median_px=given.get("median_px", 3),
        match=given.get("match", False),
        phase=phase,
        turned=not given["as_they_are"],
        overlaps=given["overlaps"],
        seed=given["seed"],
    )
    settings = TrainingSettings(
        recipe_of(kind, given["recipe"], given["set_"] or ()),
        given["steps"],
        given["seed"],
        60.0 * given["minutes"] or math.inf,
    )
    version = given["version"]
    if not version:
        # Of what is added to a bundle, a version of its own: a registry tells models by it.
        version = __version__ if base is None else f"{base.description.version}+{kind}"
    naming = Naming(given["name"] or given["out"].resolve().name, version, _command(kind, given))
    return Request(data, settings, naming)


def _command(kind: Kind, given: dict[str, Any]) -> str:
    words = ["grainwatch", "train", kind]
    for name, value in given.items():
        if name == "overlaps":
            words += [] if value else ["--no-overlaps"]
            continue
        if value is None or value is False or value == "" or (name == "into" and kind == "pixelcnn"):
            continue
        option = "--" + name.rstrip("_").replace("_", "-")
        if value is True:
            words.append(option)
        else:
            for each in value if isinstance(value, list) else [value]:
                words += [option, f"{each:g}" if isinstance(each, float) else str(each)]
    return shlex.join(words)


def _watching(line: ProgressLine, cores: int) -> Watching:
    from offline_training.micrograph.bundles import Watching

    def tell(text: str) -> None:
        line.end()
        print(text, file=sys.stderr, flush=True)

    return Watching(line.show, tell)


def _written(made: Made, out: Path) -> None:
    time, held_out = made.metrics["time"], made.metrics["conditions"]
    kind = "synthetic images" if held_out["synthetic"] else "images"
    print(f"{out}: written" + (f"; {', '.join(made.pictures)} beside it" if made.pictures else ""))
    print(
        f"  {time['steps']} steps, {duration(time['training_s'])}; judged on {held_out['patches']} patches of"
        f" {held_out['images']} {kind} ({held_out['groups']} groups) that nothing was trained on"
    )


def _judged(made: Made) -> None:
    if novelty := made.metrics.get("novelty"):
        print(
            f"  held-out images called novel: {novelty['called_novel']} of {novelty['images']}"
            f" (1 in {1 / novelty['level']:.0f} expected)"
        )
    if posterior := made.metrics.get("posterior"):
        print(f"  posterior of {len(posterior['candidates'])} conditions:")
        print(
            f"    log score {posterior['log_score']:.3f} (flat {posterior['prior_log_score']:.3f}),"
            f" calibration error {posterior['calibration_error']:.3f},"
            f" most probable right {posterior['right']:.2f}"
        )
