"""A flag that all commands of the evaluation have."""

import os


def add_num_workers(parser) -> None:
    """`parser` is a parser or a group of one."""
    parser.add_argument(
        "--num_workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="threads that read files (default: one a core, here %(default)s)",
    )
