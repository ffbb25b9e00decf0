"""What huggingface_hub raises, as HubError: what is wrong in a line, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loader.errors import HubError

LOGIN = "set HF_TOKEN, or run: hf auth login"
BUSY = frozenset({408, 429, 500, 502, 503, 504})


@contextmanager
def explained(source: str, revision: str | None) -> Iterator[None]:
    """Turn errors of huggingface_hub, and of the disk it writes to, into HubError."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (http_error(), OSError, HFValidationError) as err:
        raise _hub_error(source, revision, err) from err


def http_error() -> type[Exception]:
    """The base of everything the HTTP client raises, whichever client this huggingface_hub uses."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base


def is_unreachable(err: Exception) -> bool:
    """Whether the hub did not answer at all."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(err, http_error()) and not isinstance(err, HfHubHTTPError)


def is_busy(err: Exception) -> bool:
    """Whether the hub answered that it cannot answer now."""
    return getattr(getattr(err, "response", None), "status_code", None) in BUSY


def _hub_error(source: str, revision: str | None, err: Exception) -> HubError:
    from huggingface_hub import errors

    if isinstance(err, errors.LocalEntryNotFoundError) and isinstance(err.__cause__, Exception):
        return _hub_error(source, revision, err.__cause__)
    if isinstance(err, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return HubError(source, "is not wholly in the cache, and HF_HUB_OFFLINE forbids asking the hub.")
    if isinstance(err, errors.HFValidationError):
        return HubError(
            source, "is not a hub id, which has the form owner/name. If it is a folder, there is none."
        )
    if isinstance(err, errors.HfHubHTTPError):
        return _answer(source, revision, err)
    if is_unreachable(err):
        return _unreachable(source, err)
    return HubError(source, f"could not be stored in the cache: {err}. HF_HOME says where that is.")


def _answer(source: str, revision: str | None, err: Exception) -> HubError:
    """The hub answered, with an error status."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    status = getattr(getattr(err, "response", None), "status_code", 0)
    if isinstance(err, errors.GatedRepoError):
        page = f"{hub}/{source.partition('@')[0]}"
        return HubError(source, f"is gated: accept its terms on {page}, then {LOGIN}")
    if isinstance(err, errors.RevisionNotFoundError):
        return HubError(source, f"has no revision {revision!r}: give a branch, a tag or a commit.")
    if isinstance(err, errors.RepositoryNotFoundError):
        return HubError(
            source,
            f"there is no such folder here, and {hub} has no such model that you may see. "
            f"Check the spelling; if it is private, {LOGIN}",
        )
    if status in (401, 403):
        return HubError(source, f"{hub} refuses the token ({status}): {LOGIN}")
    if status in BUSY:
        return HubError(source, f"{hub} is busy or down ({status}): try again later.", retry=True)
    return HubError(source, f"{hub} answered {status or 'with an error'}: {_first_line(err)}")


def _unreachable(source: str, err: Exception) -> HubError:
    from huggingface_hub import constants

    return HubError(
        source,
        f"{constants.ENDPOINT} cannot be reached ({_first_line(err) or type(err).__name__}). Check "
        "the network, the proxy and HF_ENDPOINT, or give a folder that holds the model.",
        retry=True,
    )


def _first_line(err: Exception) -> str:
    return next((line.strip() for line in str(err).splitlines() if line.strip()), "")
