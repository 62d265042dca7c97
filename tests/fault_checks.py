"""What holds after any fault: what was finished is used, and in the end all is as if nothing had happened."""


def leave_alone(runs, job, folder):
    """What a job leaves that nothing happens to, and what it took to get there."""
    folder.mkdir()
    ended = runs.run(job.script, job.flags(folder), folder)
    assert ended.status == 0, ended.output
    return job.result(folder), ended


def different(first, second) -> list:
    """The names of what is not equal, however deep."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return [] if first == second else [""]
    names = first.keys() | second.keys()
    return [f"{name}/{below}" for name in sorted(names) for below in different(first.get(name), second.get(name))]


def start_again(runs, job, folder, whole, after: str):
    """The same command once more, after a fault."""
    finished = job.finished(folder)
    ended = runs.run(job.script, job.flags(folder), folder)
    assert ended.status == 0, f"{after}: {ended.output}"
    assert finished <= job.kept(folder, ended.output), after
    result = job.result(folder)
    assert result == whole, f"{after}: not equal: {different(whole, result)}\n{ended.output}"
