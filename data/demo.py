"""The first minute: makes up a few sounds, builds a dataset of them, draws it and turns it back into sound.

python -m tonefield.data.demo --output_dir demo
"""

import argparse
import shutil
from pathlib import Path

from tonefield.command_line import make_parser, parse, run


def parse_args(argv=None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--output_dir", default="demo", metavar="DIR", help="where all goes (default: %(default)s)")
    parser.add_argument(
        "--num_sounds", type=int, default=24, metavar="N", help="sounds to make up (default: %(default)s)"
    )
    return parse(parser, argv)


def main(args: argparse.Namespace) -> None:
    import soundfile

    from tonefield import audio_to_images
    from tonefield.data.synthetic import KINDS, synthesize

    folder = Path(args.output_dir)
    shutil.rmtree(folder / "sounds", ignore_errors=True)
    shutil.rmtree(folder / "dataset", ignore_errors=True)
    for index in range(args.num_sounds):
        kind = KINDS[index % len(KINDS)]
        (folder / "sounds" / kind).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / "sounds" / kind / f"{index:02d}.wav", synthesize(kind, 8.9, 22050, seed=index), 22050)
    print(f"{args.num_sounds} made-up sounds in {folder / 'sounds'}")
    audio_to_images.main(
        audio_to_images.parse_args(
            [
                f"--input_dir={folder / 'sounds'}",
                f"--output_dir={folder / 'dataset'}",
                "--resolution=256,128",
                "--previews=8",
            ]
        )
    )
    previews = folder / "dataset" / "previews"
    print(f"Look at {previews / 'overview.png'} and listen to {previews / '000.wav'} and its neighbours.")


if __name__ == "__main__":
    run(main, parse_args())
