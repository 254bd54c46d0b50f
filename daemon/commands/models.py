"""``grainwatch models``: the registry of models, and their exchange while the daemon runs."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import msgspec
import typer

from daemon.commands.models_view import (
    console,
    models_table,
    say,
    show_history,
    show_model,
    show_summary,
)
from daemon.commands.run import enter_folder_of
from daemon.configuration import Configuration
from daemon.control import SOCKET_NAME
from daemon.models.registry import Model, Registry, RegistryError, operator
from daemon.models.resolve import model_name, names_of, resolve, without_registry
from grainwatch.commands.status import ask
from grainwatch.config import ConfigError, EnginesTable
from pipelines.engines.bundle import Bundle, BundleError, load_bundle
from pipelines.engines.choice import open_engine
from pipelines.engines.flavours import EngineError
from pipelines.engines.shipped import find_bundle, shipped_bundles

#: A daemon has to warm a model before it answers.
TIMEOUT_S: Final = 900.0
#: States from which a model is taken into use.
_AT_HAND: Final = ("candidate", "shadow", "retired")

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Keep versions of models, and exchange them while the daemon runs.",
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The daemon's configuration file.")]
Name = Annotated[str, typer.Argument(help="The model's name; or what the configuration calls it.")]
Version = Annotated[str, typer.Argument(help="May be left out where only one can be meant.")]
Why = Annotated[str, typer.Option(help="For the history.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


#: Does without a daemon what one would: given who asks, says what it did, with which model.
_Alone: TypeAlias = Callable[[str], tuple[str, Model]]


@dataclass(frozen=True)
class _Site:
    """A daemon's registry, its control socket, and by stream the bundles that its configuration names."""

    registry: Registry
    control: Path
    bundles: dict[str, tuple[str, ...]]
    share: float
    engines: EnginesTable

    @property
    def names(self) -> list[str]:
        """All bundles that the configuration names."""
        return [name for names in self.bundles.values() for name in names]

    def name(self, given: str) -> str:
        """Return the registry's name of what was given: Cu is the name of a bundle that has another.

        Raises
        ------
        RegistryError
            If it is a bundle that comes with grainwatch, and the registry has none of that name.
        """
        name = given if self.registry.models(given) else model_name(given)
        if name != given and not self.registry.models(name):
            raise RegistryError(
                f"{given} comes with grainwatch and is not in the registry:"
                f" `grainwatch models add CONFIG {given}`"
            )
        return name

    def streams(self, model: str) -> list[str]:
        """Return the streams that use a model."""
        return [stream for stream, names in self.bundles.items() if names_of(model, names)]


@contextmanager
def _site(config: Path) -> Iterator[_Site]:
    configuration = Configuration.read(config.absolute(), str(config))
    enter_folder_of(config)
    table = configuration.config.daemon
    registry = Registry(Path(table.state_dir))
    bundles = {stream: plugin.models for stream, plugin in configuration.pipelines().items()}
    control = Path(table.runtime_dir) / SOCKET_NAME
    share, engines = configuration.config.models.shadow_share, configuration.config.engines
    try:
        yield _Site(registry, control, bundles, share, engines)
    except (RegistryError, BundleError) as error:
        raise ConfigError(f"models: {error}") from error
    finally:
        registry.close()


@app.callback()
def models() -> None:
    """Keep versions of models, and exchange them while the daemon runs."""


@app.command("list")
def list_(
    config: ConfigFile,
    name: Annotated[str, typer.Argument(help="Only the versions of this model.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the models of the registry, and which bundle each stream uses."""
    with _site(config) as site:
        name = site.name(name) if name else ""
        # Where there is none of the name, it says what there is.
        found = site.registry.models(name) or ([site.registry.find(name)] if name else [])
        streams = {m.name: site.streams(m.name) for m in found}
        used = _used(site)
        if as_json:
            listed = [{**_facts(m), "streams": streams[m.name]} for m in found]
            _print_json({"models": listed, "bundles": used})
            return
        to = console()
        if found:
            to.print(models_table(found, streams))
        else:
            say(to, f"no models in the registry {site.registry.path}; `grainwatch models add` adds one")
        for row in used:
            is_what = f"is {row['model']} {row['version']} ({row['sha256'][:8]}), {row['from']}"
            say(to, f"{row['stream']}: {row['problem'] or row['name'] + ' ' + is_what}")


@app.command()
def show(config: ConfigFile, name: Name, version: Version = "", as_json: AsJson = False) -> None:
    """Show what a model is, how good it was found to be, who did what with it, and what its shadow found."""
    with _site(config) as site:
        registry, name = site.registry, site.name(name)
        # Whoever names no version wants the one that serves.
        active = registry.active(name) if not version else None
        model = active or registry.find(name, version)
        description = registry.verify(model).description
        events = registry.history(name)
        summary = registry.comparison_summary(model)
        if as_json:
            _print_json(
                {
                    **_facts(model),
                    "streams": site.streams(name),
                    "description": msgspec.to_builtins(description),
                    "history": [asdict(e) for e in events],
                    "shadow": summary,
                }
            )
            return
        to = console()
        show_model(to, model, description)
        if summary["n"] or model.state == "shadow":
            show_summary(to, summary)
        show_history(to, events)


@app.command()
def add(
    config: ConfigFile,
    bundle: Annotated[str, typer.Argument(help="A bundle's folder, or the name of one that comes along.")],
    note: Annotated[str, typer.Option(help="Where it is from, for those who see it in the list.")] = "",
    version: Annotated[
        str, typer.Option("--as", metavar="VERSION", help="Give it this version in place of its own.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Verify a bundle and put a copy of it into the registry, as a candidate."""
    try:
        # Before the folder is another: a path on the command line counts from where it is typed.
        folder = find_bundle(bundle).absolute()
    except BundleError as error:
        raise ConfigError(f"models: {error}") from error
    with _site(config) as site:
        _self_test(load_bundle(folder), site.engines)
        try:
            model = site.registry.add(folder, operator(), note or str(folder), version)
        except RegistryError as error:
            raise RegistryError(f"--as {version}: {error}" if version else str(error)) from error
        if as_json:
            _print_json({**_facts(model), "streams": site.streams(model.name)})
            return
        print(f"{model.name} {model.version} ({model.sha256[:8]}) is in the registry: {model.state}")
        _print_remark(_remark(site, model.name))


@app.command()
def verify(
    config: ConfigFile,
    name: Annotated[str, typer.Argument(help="Only this model.")] = "",
    version: Annotated[str, typer.Argument(help="Only this version.")] = "",
    as_json: AsJson = False,
) -> None:
    """Check every file of the models in the registry, and their answers to their self-test."""
    with _site(config) as site:
        name = site.name(name) if name else ""
        chosen = [] if version else site.registry.models(name)
        if name and not chosen:
            chosen = [site.registry.find(name, version)]
        problems = {id(m): _problem(site, m) for m in chosen}
        if as_json:
            _print_json({"models": [{**_facts(m), "problem": problems[id(m)]} for m in chosen]})
        else:
            for m in chosen:
                print(f"{m.name} {m.version}: {problems[id(m)] or 'intact, passes its self-test'}")
            if not chosen:
                print(f"no models in the registry {site.registry.path}")
    if any(problems.values()):
        raise typer.Exit(1)


@app.command()
def shadow(
    config: ConfigFile,
    name: Name,
    version: Version = "",
    share: Annotated[
        float | None, typer.Option(help="Part of the frames that it computes too. [models.shadow_share]")
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End it; the model is a candidate again.")] = False,
    why: Why = "",
    as_json: AsJson = False,
) -> None:
    """Have a model compute a share of the frames beside the live one: compared and kept, not published."""
    if share is not None and (not 0.0 < share <= 1.0 or math.isnan(share)):
        raise ConfigError(f"models shadow: --share: expected more than 0 and at most 1, got {share:g}")
    with _site(config) as site:
        among = ("shadow",) if stop else _AT_HAND
        model = site.registry.find(site.name(name), version, among)
        part = site.share if share is None else share
        if not stop:
            _check(site, model)

        def alone(by: str) -> tuple[str, Model]:
            if stop:
                return "is in the shadow no more", site.registry.set_state(model, "candidate", by, why)
            did = f"computes {100 * part:.3g} % of the frames in the shadow"
            return did, site.registry.set_state(model, "shadow", by, why, part)

        how = {"share": 0.0 if stop else part}
        _do(site, "shadow", model, {**how, "why": why}, alone, as_json)


@app.command()
def activate(
    config: ConfigFile, name: Name, version: Version = "", why: Why = "", as_json: AsJson = False
) -> None:
    """Have a model serve the streams that name it, in place of the one that does; no frame is lost."""
    with _site(config) as site:
        # One that is retired was given up: who wants it back says which.
        among = _AT_HAND if version else ("candidate", "shadow")
        model = site.registry.find(site.name(name), version, among)
        _check(site, model)

        def alone(by: str) -> tuple[str, Model]:
            return "is active", site.registry.set_state(model, "active", by, why)

        _do(site, "activate", model, {"why": why}, alone, as_json)


@app.command()
def rollback(config: ConfigFile, name: Name, why: Why = "", as_json: AsJson = False) -> None:
    """Go back to the model that served before; again, back by one more."""
    with _site(config) as site:
        registry, name = site.registry, site.name(name)
        previous, active = registry.previous(name), registry.active(name)
        model = active or previous
        if model is None:
            raise RegistryError(f"model {name}: there is nothing to roll back, no version is active")
        if previous is not None:
            _check(site, previous)
        elif site.streams(name) and without_registry(name, site.names) is None:
            raise RegistryError(
                f"model {name}: no version was active before {model.version}, and nothing of that name comes"
                " with grainwatch: activate another version"
            )

        def alone(by: str) -> tuple[str, Model]:
            back = registry.rollback(name, by, why)
            if back is not None:
                return "is active again", back
            shipped = without_registry(name, site.names) is not None
            return "is retired" + (
                ", the one that comes with grainwatch serves again" if shipped else ""
            ), model

        _do(site, "rollback", previous or model, {"why": why, "version": ""}, alone, as_json)


# What they have in common.


def _do(site: _Site, what: str, model: Model, more: dict[str, Any], alone: _Alone, as_json: bool) -> None:
    """Have the daemon do it, or where none runs do it in the registry, and print what was done."""
    by = operator()
    answers = _answers(site.control)
    if answers:
        request = {"command": "models", "do": what, "name": model.name, "version": model.version, "by": by}
        answer = ask(site.control, {**request, **more}, TIMEOUT_S)["models"]
    else:
        begin = time.monotonic()
        did, changed = alone(by)
        did = f"{changed.name} {changed.version} ({changed.sha256[:8]}) {did}"
        answer = {"did": did, "name": changed.name, "version": changed.version, "sha256": changed.sha256}
        answer["took_s"] = time.monotonic() - begin
    answer = {**answer, "daemon": answers, "remark": _remark(site, model.name)}
    if as_json:
        _print_json(answer)
        return
    rest = f"{answer['took_s']:.1f} s" if answers else "no daemon runs: it counts from its next start"
    print(f"{answer['did']}; {rest}")
    _print_remark(answer["remark"])


def _answers(control: Path) -> bool:
    """Return whether a daemon listens.

    Raises
    ------
    ConfigError
        If one may, but not to this user.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(5.0)
        try:
            probe.connect(str(control))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            return False
        except OSError as error:
            raise ConfigError(f"models: the daemon at {control} cannot be asked: {error}") from error
    return True


def _check(site: _Site, model: Model) -> None:
    """Refuse a model that the daemon could not use.

    Raises
    ------
    RegistryError, BundleError
        If its files are not what was added, or it fails its self-test.
    """
    _self_test(site.registry.verify(model), site.engines)


def _self_test(bundle: Bundle, engines: EnginesTable) -> None:
    """Run the networks as the daemon would, which tests each with its batch of the bundle."""
    try:
        for network in bundle.networks():
            open_engine(network, engines)
    except EngineError as error:
        raise BundleError(f"{bundle.folder}: {error}") from error


def _problem(site: _Site, model: Model) -> str:
    try:
        _check(site, model)
    except (RegistryError, BundleError) as error:
        return str(error)
    return ""


def _remark(site: _Site, name: str) -> str:
    if site.streams(name):
        return ""
    return f"no stream uses it: no pipeline.bundle of the configuration names {name}"


def _used(site: _Site) -> list[dict[str, str]]:
    """Return what each bundle that the configuration names is now."""
    rows = []
    for stream, names in site.bundles.items():
        for name in names:
            row = {"stream": stream, "name": name, "model": "", "version": "", "sha256": ""}
            row |= {"folder": "", "from": "", "problem": ""}
            try:
                ref = resolve([name], site.registry)[name]
                described = load_bundle(Path(ref.folder)).description
            except (BundleError, RegistryError) as error:
                row["problem"] = str(error)
            else:
                of_registry = site.registry.active(described.name)
                registered = of_registry is not None and str(of_registry.folder) == ref.folder
                shipped = (
                    "comes with grainwatch" if Path(ref.folder) in shipped_bundles().values() else "a folder"
                )
                row |= {"model": described.name, "version": described.version, "sha256": ref.sha256}
                row |= {"folder": ref.folder, "from": "of the registry" if registered else shipped}
            rows.append(row)
    return rows


def _facts(model: Model) -> dict[str, Any]:
    return {**asdict(model), "folder": str(model.folder)}


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


def _print_remark(remark: str) -> None:
    if remark:
        print(f"note: {remark}")
