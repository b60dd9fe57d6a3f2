"""Lightning's progress counters, put into one of two plain forms before they go into a checkpoint.

Saved as they stand, they mean different things in different hooks, and one of those meanings makes the next epoch empty.
Here a checkpoint says either «in the middle of epoch e, k batches done» or «e epochs done».
"""

from typing import Any


def make_canonical(loops: dict[str, Any], batches_per_epoch: int) -> None:
    """Rewrites `loops["fit_loop"]` of a checkpoint in place.

    Args:
        batches_per_epoch: micro-batches that an epoch uses on this rank. With all of them done the epoch counts as done:
            whoever saves there has evaluated already, or goes without that one evaluation.
    """
    fit = loops["fit_loop"]
    batches, epochs = fit["epoch_loop.batch_progress"], fit["epoch_progress"]
    done = batches["current"]["ready"]
    epoch = epochs["current"]["ready"]  # epochs begun
    if done >= batches_per_epoch:
        _set(batches["current"], 0)
        _set(epochs["current"], epoch)
        _set(epochs["total"], epoch)
    else:
        _set(batches["current"], done)
        for part in ("current", "total"):
            epochs[part].update(ready=epoch, started=epoch, processed=epoch - 1, completed=epoch - 1)
    _set(batches["total"], batches["total"]["ready"])
    batches["is_last_batch"] = False
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = batches["total"]["ready"]
    fit.pop("combined_loader", None)  # where the data goes on follows from the counters


def _set(tracker: dict[str, Any], value: int) -> None:
    for name in tracker:
        tracker[name] = value
