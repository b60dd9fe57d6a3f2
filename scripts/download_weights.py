"""Download what an experiment needs: encoders, discriminator trunk, VGG16 and LPIPS weights, Inception, decoders.

    python scripts/download_weights.py --experiment rae_dino      everything that experiment loads
    python scripts/download_weights.py vgg16 lpips                things by name
    python scripts/download_weights.py --list                     present or not, where each belongs, from where
    python scripts/download_weights.py --check                    compare the present ones with their hashes

Environment: HTTPS_PROXY / HTTP_PROXY / NO_PROXY, HF_ENDPOINT (hub mirror), HF_TOKEN (gated encoders), HF_HOME (where
encoders go), HF_HUB_OFFLINE.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

if TYPE_CHECKING:
    from src.core.assets.download import Progress
    from src.core.assets.needs import Need


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 where everything asked for is there and right, 1 otherwise."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not (args.names or args.experiment or args.all or args.list or args.check):
        parser.error(
            "say what to download: --experiment NAME, names of single files, or --all (`--list` shows the names)"
        )
    from src.core.errors import UserError

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        wanted = _wanted(args)
        if not wanted:
            print("nothing to download: all its networks are untrained or in folders of this machine")
        if args.list or args.dry_run:
            return _list(wanted, args.mirror)
        return _check(wanted) if args.check else _download(wanted, args.mirror, args.force)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `--list | head`
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="exit codes: 0 all there and right; 1 something is missing or wrong; 2 wrong options; 130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME|KEY=VALUE",
        help="assets by name, and overrides of the experiment's configuration",
    )
    parser.add_argument(
        "--experiment", action="append", default=[], metavar="NAME", help="of configs/experiment; repeatable"
    )
    parser.add_argument("--all", action="store_true", help="everything in the table, all encoders and decoders")
    parser.add_argument(
        "--list", action="store_true", help="show files, places, sources and what is present; no download"
    )
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="the same as --list")
    parser.add_argument(
        "--check", action="store_true", help="compare present files with their hashes; exit 1 on a mismatch"
    )
    parser.add_argument("--force", action="store_true", help="download files again that are present")
    parser.add_argument(
        "--weights_dir", "--weights-dir", type=Path, metavar="DIR", help="default: paths.weights_dir, weights"
    )
    parser.add_argument(
        "--mirror",
        action="append",
        default=[],
        metavar="URL",
        help="tried before the original hosts: the same paths behind it, or a copy of the weights folder; repeatable",
    )
    return parser


def _wanted(args: argparse.Namespace) -> "list[Need]":
    """What the command line asks for, each thing once."""
    from src.core.assets.needs import Need, needs
    from src.core.assets.table import ASSETS, FileAsset, by_name
    from src.models.encoder_presets import expand_encoder

    overrides = [name for name in args.names if "=" in name]
    assets = [by_name(name) for name in args.names if "=" not in name]
    if args.all or not (args.experiment or assets):
        assets = list(ASSETS)
    weights_dir = ROOT / (args.weights_dir or Path("weights")).expanduser()
    wanted = [Need(a.name, a, weights_dir / a.place if isinstance(a, FileAsset) else None) for a in assets]
    for experiment in args.experiment:
        if args.weights_dir:
            overrides = [*overrides, f"paths.weights_dir='{weights_dir}'"]
        config = _without_what_the_user_brings(_compose(experiment, overrides), experiment)
        config["model"] = expand_encoder(config["model"])
        configured = ROOT / Path(config.get("paths", {}).get("weights_dir") or "weights").expanduser()
        wanted += needs(config, configured, ROOT)
    once: dict[tuple[object, Path | None], Need] = {}
    for need in wanted:
        once.setdefault((need.asset, need.place), need)
    return list(once.values())


def _compose(experiment: str, overrides: list[str]) -> dict[str, Any]:
    """The experiment's configuration as a plain dict; interpolations that only a run can resolve stay as text."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from src.core.errors import UserError

    configs = ROOT / "configs"
    known = ", ".join(sorted(path.stem for path in (configs / "experiment").glob("*.yaml")))
    if not (configs / "experiment" / f"{experiment}.yaml").is_file():  # an optional group would pass over it in silence
        raise UserError(f"no experiment '{experiment}' in {configs / 'experiment'}. Experiments: {known or 'none'}")
    try:
        with initialize_config_dir(config_dir=str(configs), version_base="1.3"):
            config = compose("train", overrides=[f"experiment={experiment}", *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"experiment '{experiment}' can't be composed: {error}") from error

    def plain(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {name: plain(value, f"{key}.{name}" if key else str(name)) for name, value in node.items()}
        if isinstance(node, list):
            return [plain(value, f"{key}[{index}]") for index, value in enumerate(node)]
        if isinstance(node, str) and "${" in node:
            try:
                found = OmegaConf.select(config, key)
            except Exception:  # a resolver of the running program, or of hydra's own run folder
                return node
            return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
        return node

    return plain(OmegaConf.to_container(config, resolve=False), "")


def _without_what_the_user_brings(config: dict[str, Any], experiment: str) -> dict[str, Any]:
    """`required` is no file: it stands where an experiment leaves its decoder to the user, and training refuses it."""
    model = config.get("model") or {}
    if model.get("pretrained_decoder_path") != "required":
        return config
    print(
        f"left out: the decoder that {experiment} starts from. Add model.pretrained_decoder_path=PATH to look for it, or the "
        "name of a released one (such as decoder-dinov2) to get it"
    )
    return {**config, "model": {**model, "pretrained_decoder_path": None}}


def _list(wanted: "list[Need]", mirrors: Sequence[str]) -> int:
    from src.core.assets.hub import cached, files_of
    from src.core.assets.obtain import hash_text, sources
    from src.core.assets.table import FileAsset, RepoAsset

    for need in wanted:
        asset = need.asset
        if isinstance(asset, RepoAsset):
            here = cached(asset.repo_id)
            title = f"{asset.name}: {asset.what}{' (gated: needs HF_TOKEN)' if asset.gated else ''}"
            size = f"{sum(path.stat().st_size for path in files_of(here)):,} bytes" if here else "stated by the hub"
            lines = [
                f"belongs to {here or 'the cache of huggingface_hub (HF_HOME)'}",
                f"size {size}; hash stated by the hub",
            ]
        else:
            here = need.place if need.place is not None and need.place.exists() else None
            title, lines = need.key, [f"belongs to {need.place}", "no known source: yours to provide"]
        if isinstance(asset, FileAsset):
            about = f"about {asset.about_mib:,.2f} MiB" if asset.about_mib else "not published"
            size = f"{here.stat().st_size:,} bytes" if here else about
            title, lines[1] = f"{asset.name}: {asset.what}", f"size {size}; hash {hash_text(asset)}"
            lines += [f"from {source.url}" for source in sources(asset, mirrors)]
        print(f"{'present' if here else 'missing'}  {title}", *lines, sep="\n         ")
    return 0


def _check(wanted: "list[Need]") -> int:
    """Hashes of what is present; absent things are named and are no mismatch."""
    from src.core.assets.digests import verify, verify_blob
    from src.core.assets.hub import cached, files_of
    from src.core.assets.table import FileAsset, RepoAsset

    wrong = 0
    for need in wanted:
        if isinstance(need.asset, RepoAsset):
            folder = cached(need.asset.repo_id)
            verdicts = [(f"{need.asset.name}/{p.name}", verify_blob(p)) for p in files_of(folder)] if folder else []
        elif need.place is not None and need.place.is_file():
            digest = need.asset.digest if isinstance(need.asset, FileAsset) else None
            verdicts = [(str(need.place), verify(need.place, digest))]
        else:
            verdicts = []
        if not verdicts:
            print(f"missing   {need.place or need.key}")
        for name, verdict in verdicts:
            print(f"{ {True: 'ok', False: 'MISMATCH', None: 'unknown'}[verdict.ok]:<9} {name}  {verdict.detail}")
            wrong += verdict.ok is False
    if wrong:
        print(f"error: {wrong} file(s) do not match; get them again with --force", file=sys.stderr)
    return 1 if wrong else 0


def _download(wanted: "list[Need]", mirrors: Sequence[str], force: bool) -> int:
    """One thing after another; what fails is reported at the end, the rest is still fetched."""
    from src.core.assets.obtain import obtain
    from src.core.errors import UserError

    failures = []
    for need in wanted:
        try:
            with _bar(need.place.name if need.place else need.key) as progress:
                line = obtain(need, mirrors, force, progress)
            print(f"ready   {line}", flush=True)
        except UserError as error:
            failures.append(str(error))
            print(f"failed  {need.place or need.key}", flush=True)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


@contextmanager
def _bar(name: str) -> "Iterator[Progress]":
    """A progress bar on standard error; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
