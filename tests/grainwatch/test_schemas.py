"""The shipped JSON Schemas are those of the code, and what is sent obeys them."""

from __future__ import annotations

import base64
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest

from daemon.sinks.simulator import synthetic_health, synthetic_micrograph, synthetic_result
from grainwatch import schemas
from grainwatch.messages import (
    MESSAGES,
    AnyMessage,
    ChangeReport,
    DriftObservation,
    DriftReport,
    EdgeHealth,
    Grain,
    MapPoint,
    MapUpdate,
    StreamHealth,
    encode,
)

ONE = (1.0, 0.0, 0.0, 0.0)


def drift_report() -> DriftReport:
    return DriftReport(
        seq=3,
        source="laue",
        series_uid="a" * 32,
        frame=40,
        material="Ge",
        calibration_hash="c",
        state="moved",
        frames=41,
        unseen=0,
        change=(0.1, 1.0, -1.0),
        sigma=(0.01, 0.1, 0.1),
        offset=(0.0, 0.0, 0.0),
        offset_sigma=(0.01, 0.1, 0.1),
        statistic=1.5,
        limit=1.2,
        alarm_series_uid="a" * 32,
        alarm_frame=38,
        text="detector moved",
    )


def change_report() -> ChangeReport:
    return ChangeReport(
        seq=4,
        source="sem",
        series_uid="a" * 32,
        frame=40,
        state="changed",
        images=41,
        statistic=3.5,
        limit=3.2,
        images_between_false_alarms=1e4,
        components=("mean", "std"),
        change=(0.1, 4.0),
        foremost="std",
        correlated=False,
        alarm_series_uid="a" * 32,
        alarm_frame=38,
        text="std of the images grew",
    )


def messages() -> list[AnyMessage]:
    rng = np.random.default_rng(1)
    point = MapPoint((1, 2), 3, 0, "Ti", ONE, 7, 0.5, 1e-6, 0.2, (0.0,) * 6)
    return [
        synthetic_result(4, rng, seq=9, series_uid="a" * 32),
        synthetic_result(4, rng, seq=9, series_uid="a" * 32, crystals=0),
        msgspec.structs.replace(
            synthetic_result(4, rng, seq=9, series_uid="a" * 32),
            drift=DriftObservation("Ge", (0.1, 0.2, 0.3), (1.0, 0.0, 0.0, 1.0, 0.0, 1.0), 4.0, 100),
        ),
        drift_report(),
        synthetic_micrograph(4, rng, seq=9, series_uid="a" * 32),
        synthetic_micrograph(4, rng, seq=9, series_uid="a" * 32, pixel_size_um=None),
        change_report(),
        MapUpdate(
            seq=1,
            source="laue",
            series_uid="a" * 32,
            shape=(3, 4),
            step_um=(1.0, 1.0),
            kind="delta",
            points=(point,),
            grains=(Grain(7, "Ti", 1, ONE, 0.0, (1.0, 2.0)),),
            merged=((2, 1),),
        ),
        msgspec.structs.replace(
            synthetic_health(3, 5.0),
            streams=(StreamHealth("laue", "running", "", 1, 1, 0, 0, 0, 0, 0, 2.5, 0.01, 0.02),),
            edges=(EdgeHealth("intake", "block", 64, 1, 5, 0),),
        ),
    ]


def as_json(value: Any) -> Any:
    """What a reader has who decodes msgpack without knowing the types, in JSON's own types."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list) else value


def validator(schema: str) -> jsonschema.Draft202012Validator:
    loaded = schemas.load(schema)
    jsonschema.Draft202012Validator.check_schema(loaded)
    return jsonschema.Draft202012Validator(loaded)


def test_the_files_are_up_to_date() -> None:
    shipped = {
        name: (schemas.files("grainwatch.schemas") / name).read_text("utf-8") for name in schemas.generate()
    }
    assert shipped == schemas.generate(), "run: python -m grainwatch.schemas"
    folder = schemas.files("grainwatch.schemas")
    assert {p.name for p in folder.iterdir() if p.name.endswith(".json")} == set(shipped)


def test_real_messages_obey_their_schema() -> None:
    seen = set()
    for message in messages():
        wire = as_json(msgspec.msgpack.decode(encode(message)))
        validator(type(message).SCHEMA).validate(wire)
        seen.add(type(message))
    assert seen == set(MESSAGES)


def test_a_schema_refuses_other_things() -> None:
    wire = as_json(msgspec.msgpack.decode(encode(messages()[0])))
    check = validator("grainwatch.laue/1")
    for broken in (
        {k: v for k, v in wire.items() if k != "key"},
        {**wire, "schema": "grainwatch.laue/2"},
        {**wire, "n_peaks": "many"},
        {**wire, "crystals": [{**wire["crystals"][0], "quaternion": [1.0, 0.0]}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            check.validate(broken)


def test_write_removes_what_is_gone(tmp_path: Any) -> None:
    (tmp_path / "grainwatch.tea-1.json").write_text("{}")
    paths = schemas.write(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(paths)
