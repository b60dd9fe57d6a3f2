"""Download what an experiment needs: encoders, discriminator trunk, VGG16 and LPIPS weights, Inception, decoders.

    python scripts/download_weights.py --experiment rae_dino      everything that experiment loads
    python scripts/download_weights.py vgg16 lpips clip-l         files by name, encoders by preset or hub id
    python scripts/download_weights.py --list                     status, path and sources of each file; all presets
    python scripts/download_weights.py --check                    compare present files with their hashes

Environment: HTTPS_PROXY / HTTP_PROXY / NO_PROXY, HF_ENDPOINT (hub mirror), HF_TOKEN (gated encoders), HF_HOME (cache of
encoders), HF_HUB_OFFLINE.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from src.core.download import addresses, check, download, present
from src.core.files import resolve
from src.core.requirements import FILES, USERS_CHOICE, Asset, by_name, requirements
from src.core.terminal import run_program
from src.core.text import quoted
from src.models.encoder_presets import hub_assets, with_places

USUAL = ("dinov2-b", "siglip-so400m", "siglip2-b", "mae-b", "dinov3-b", "dinov3-l")
"""Encoders that the experiments use."""


def main(argv: Sequence[str] | None = None) -> int:
    """Return exit status 0, or 1 if a download failed or --check found a wrong hash."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="exit codes: 0 done; 1 an unknown name, a failed download or a wrong hash; 2 wrong options; 130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME|KEY=VALUE", help="files by name, and overrides of the experiment's config")
    add("--experiment", action="append", default=[], metavar="NAME", help="file in configs/experiment; repeatable")
    add("--all", action="store_true", help="all files and the encoders of the experiments")
    add("--list", "--dry_run", "--dry-run", action="store_true", help="show files, paths, sources and what is present")
    add("--check", action="store_true", help="compare present files with their hashes; exit 1 on a mismatch")
    add("--force", action="store_true", help="download files even if they are present")
    add("--weights_dir", "--weights-dir", type=Path, metavar="DIR", help="default: paths.weights_dir, weights")
    mirror = "tried before the original hosts: has the same paths, or is a copy of the weights folder; repeatable"
    add("--mirror", action="append", default=[], metavar="URL", help=mirror)
    args = parser.parse_args(argv)
    if not (args.names or args.experiment or args.all or args.list or args.check):
        parser.error("name what to download: --experiment NAME, names of files, or --all (`--list` shows the names)")
    if wrong := [mirror for mirror in args.mirror if not mirror.startswith(("http://", "https://"))]:
        parser.error(f"--mirror {wrong[0]}: give an address such as https://mirror.example/weights")
    return run_program(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    wanted = _wanted(args)
    mirrors = [mirror.rstrip("/") for mirror in args.mirror]
    if not wanted:
        print("nothing to download: all networks are untrained or in local folders")
    if args.list:
        for asset in wanted:
            _describe(asset, mirrors)
        if not (args.names or args.experiment or args.all):
            print("\nEncoders by name (model=rae_encoder model.encoder=NAME; docs/encoders.md):")
            for name, asset in hub_assets().items():
                print(f"{'present' if present(asset) else 'missing'}  {name:<18} {asset.name}{_gated(asset)}")
        return 0
    if args.check:
        return _check(wanted)
    for line in download(wanted, mirrors, args.force):
        print(line, flush=True)
    return 0


def _wanted(args: argparse.Namespace) -> list[Asset]:
    """Return the assets that the command line asks for, without duplicates."""
    overrides = [name for name in args.names if "=" in name]
    encoders = hub_assets()
    assets = [by_name(name, encoders) for name in args.names if "=" not in name]
    if args.all or not (args.experiment or assets):
        assets = [*(encoders[name] for name in USUAL), *FILES]
    weights_dir = resolve(args.weights_dir or "weights")
    wanted = [asset.below(weights_dir) for asset in assets]
    if args.weights_dir:
        overrides.append(f"paths.weights_dir={quoted(weights_dir)}")
    for experiment in args.experiment:
        from src.core.compose import compose  # imports torch

        config = compose([f"experiment={experiment}", *overrides])
        config["model"] = with_places(config["model"])
        if config["model"].get("pretrained_decoder_path") == USERS_CHOICE:
            print(
                f"left out: the decoder that {experiment} starts from. Add model.pretrained_decoder_path=PATH to look for "
                "it, or the name of a released one (such as decoder-dinov2) to download it"
            )
        wanted += requirements(config, resolve(config["paths"]["weights_dir"]), ROOT)
    known = {asset.name: asset for asset in encoders.values()}  # a config names these by hub id
    return list(dict.fromkeys(known.get(asset.name, asset) for asset in wanted))


def _gated(asset: Asset) -> str:
    return " (gated: needs HF_TOKEN)" if asset.gated else ""


def _describe(asset: Asset, mirrors: Sequence[str]) -> None:
    here = present(asset)
    size = f"{sum(path.stat().st_size for path in here):,} bytes; " if here else ""
    folder = here[0].parent if here else "the cache of huggingface_hub (HF_HOME)"
    print(f"{'present' if here else 'missing'}  {asset.name}: {asset.what}{_gated(asset)}")
    print(f"         belongs to {asset.path or folder}")
    print(f"         {size}hash: {asset.digest or 'no published hash; the hub states one at download'}")
    for address in addresses(asset, mirrors):
        print(f"         from {address}")


def _check(wanted: Sequence[Asset]) -> int:
    """Compare present files with their hashes. Missing files are listed, but are not an error."""
    wrong = 0
    for asset in wanted:
        here = present(asset)
        if not here:
            print(f"missing   {asset.path or asset.name}")
        for path in here:
            right, detail = check(path, asset.digest)
            print(f"{ {True: 'ok', False: 'MISMATCH', None: 'unknown'}[right]:<9} {path}  {detail}")
            wrong += right is False
    if wrong:
        print(f"error: {wrong} file(s) do not match; download them again with --force", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
