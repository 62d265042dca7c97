"""What becomes of a trained network: its description, its place on the Hub."""

from pathlib import Path

from huggingface_hub import create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from tonefield.command_line import UserError, first_line


def settings_of(component) -> dict:
    """The configuration of a network or scheduler."""
    return {name: value for name, value in component.config.items() if not name.startswith("_")}


def push(args, folder: Path) -> None:
    """Uploads what was trained, without the checkpoints."""
    name = args.hub_model_id or folder.name
    unpublished = ["checkpoint-*/**", "best/**", ".*", "logs/**"]
    try:
        repo = create_repo(name, private=args.hub_private_repo or None, exist_ok=True).repo_id
        upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=unpublished)
    except (HTTPError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(f"The model is in {folder}, but could not be pushed to {name}: {first_line(error)}") from None
    print(f"pushed to {repo}")
