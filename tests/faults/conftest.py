import fault_jobs
import pytest
from fault_runs import Runs


@pytest.fixture(scope="session")
def runs():
    return Runs()


@pytest.fixture(scope="session")
def jobs(mels, tmp_path_factory):
    """A job by its name; what it works on is made when it is first asked for."""
    folder, known = tmp_path_factory.mktemp("jobs"), {}

    def sounds():
        return folder / "long" if (folder / "long").exists() else fault_jobs.long_sounds(folder / "long")

    make = {
        "images": lambda: fault_jobs.images_job(sounds()),
        "images with previews": lambda: fault_jobs.images_job(sounds(), "--previews=1", "--save_images"),
        "tokens": lambda: fault_jobs.tokens_job(sounds(), fault_jobs.make_codec(folder / "codec")),
        "unet": lambda: fault_jobs.unet_job(mels),
        "vae": lambda: fault_jobs.vae_job(folder / "vae"),
        "vae and latents": lambda: fault_jobs.vae_job(folder / "vae and latents", latents=True),
        "codec": lambda: fault_jobs.codec_job(folder / "codec run"),
        "sedd": lambda: fault_jobs.sedd_job(folder / "sedd"),
        "inference": lambda: fault_jobs.inference_job(folder / "pipes"),
        "evaluation": lambda: fault_jobs.evaluation_job(folder / "sets"),
    }

    def get(name):
        if name not in known:
            known[name] = make[name]()
        return known[name]

    return get
