"""Fetching a model's files from the Hugging Face Hub, into its shared cache."""

from pathlib import Path

from .checkpoint import CheckpointError


def fetch(
    repo_id: str,
    patterns: list[str],
    *,
    ignore: list[str] | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
) -> Path:
    """The cached snapshot of a repository, with the files that match `patterns`; honours HF_HOME and HF_HUB_OFFLINE.

    Raises CheckpointError, in one line, where the repository can't be found or read.
    """
    from huggingface_hub import constants, errors, snapshot_download  # 0.3 s, which models that are here don't wait for

    at = f"{repo_id}: no such file or folder here, and as a Hub repository: "
    try:
        return Path(
            snapshot_download(
                repo_id,
                allow_patterns=patterns,
                ignore_patterns=ignore,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
                revision=revision,
            )
        )
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo_id}: gated: accept its licence at {constants.ENDPOINT}/{repo_id}, "
            f"then log in with 'hf auth login' or pass token="
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"revision: {repo_id} has no {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(f"{at}not found (a private one needs token=)") from None
    except errors.HFValidationError:
        raise CheckpointError(f"{at}not a valid name") from None
    except errors.LocalEntryNotFoundError:
        offline = local_files_only or constants.HF_HUB_OFFLINE
        why = "downloads are switched off" if offline else "the Hub can't be reached"
        raise CheckpointError(f"{at}not, or not wholly, in the local cache, and {why}") from None
    except (OSError, errors.HTTPError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{repo_id}: the download failed: {line}") from None
