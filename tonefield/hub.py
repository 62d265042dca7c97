"""What can go wrong between this machine and the Hub, and what it means, in one line."""

from tonefield.command_line import first_line


def hub_errors() -> tuple[type[Exception], ...]:
    """What the client of the Hub raises without a network, a repository or a right, and when a connection ends."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    return HTTPError, OfflineModeIsEnabled, OSError, ValueError, RuntimeError  # the last one amid an upload


def hub_reason(error: BaseException) -> str:
    """What went wrong and what helps. Libraries hide that in the cause of what they raise, or bury it under links."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

    answer = _first_of(error, HfHubHTTPError)
    status = getattr(getattr(answer, "response", None), "status_code", None)
    if status == 401 and "Invalid credentials" in str(answer):
        return "the Hub does not know the token (401): run `hf auth login` again, or set HF_TOKEN anew"
    if status == 401 or isinstance(answer, RepositoryNotFoundError):
        return (
            f"there is no such repository, or it is private and not for this token ({status}): check the name, and"
            " run `hf auth login` or set HF_TOKEN"
        )
    if status == 403:
        return "the token has no right to do that (403)"
    if status is not None and (status == 429 or status >= 500):
        return f"the Hub cannot answer at the moment ({status}): try again later"
    broken = _first_of(error, HTTPError)
    if answer is None and broken is not None:
        return f"the connection failed ({first_line(broken).rstrip('.')})"
    return first_line(error).rstrip(".")


def _first_of(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """The first of an error and its causes that is of a kind."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def license_of(dataset_name: str) -> str | None:
    """The licence of a dataset on the Hub, if it states one and the Hub can be asked."""
    from huggingface_hub import dataset_info

    try:
        card = dataset_info(dataset_name).card_data
    except hub_errors():
        return None
    return card.get("license") if card else None
