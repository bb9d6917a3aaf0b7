"""The process that decodes one untrusted video: `python -m tav.media.decoder_process SOURCE FOLDER SETTINGS`.

It limits its own memory, file size and run time, reads the video, and leaves two files in FOLDER: the frames, and an
answer in JSON. `tav.media.decoding` starts it and reads both.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav.config import DecodeParams
from tav.media.frame_readers import read_source
from tav_model.disk_space import explained_full_disk
from tav_model.errors import FullDiskError, TavError, first_line

if TYPE_CHECKING:
    import numpy as np

FRAMES_FILE, ANSWER_FILE = "frames.npy", "answer.json"


def main() -> int:
    """Read the frames of the video that the command line names.

    The answer has one of three keys: `fps`, the frame rate, with `available` and `size` as `Frames` has them; `error`, a
    message; `full_disk`, the number and the text of a system error.
    """
    source, folder, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    # The parent ends this process in time, unless it was killed itself.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, settings["seconds"] + 1)
    _limit(resource.RLIMIT_AS, settings["memory"])
    _limit(resource.RLIMIT_FSIZE, settings["memory"])
    _limit(resource.RLIMIT_CORE, 0)
    answer: dict[str, Any]
    try:
        read = read_source(source, DecodeParams(**settings["decode"]), settings["reader"])
        _write_frames(folder / FRAMES_FILE, read.frames)
        answer = {"fps": str(read.fps), "available": read.available, "size": read.size}
    except FullDiskError as error:
        (folder / FRAMES_FILE).unlink(missing_ok=True)  # The answer needs disk space, too.
        answer = {"full_disk": [error.errno, error.strerror]}
    except TavError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": "needs more memory than is allowed for reading a video"}
    except Exception as error:  # Decoders and image libraries raise errors of any type on broken files.
        answer = {"error": f"cannot be read ({type(error).__name__}: {first_line(error)})"}
    (folder / ANSWER_FILE).write_text(json.dumps(answer), encoding="utf-8")
    return 0


def _write_frames(path: Path, frames: np.ndarray) -> None:
    """Write an array as `numpy.save` does, whose own errors do not tell whether the disk is full."""
    import numpy as np

    with explained_full_disk(path), path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(frames))
        file.write(np.ascontiguousarray(frames).data)


def _limit(kind: int, most: int) -> None:
    """Lower a resource limit of this process; a lower limit that the user has set stays."""
    current = [limit for limit in resource.getrlimit(kind) if limit != resource.RLIM_INFINITY]
    lowest = min([most, *current])
    resource.setrlimit(kind, (lowest, lowest))


if __name__ == "__main__":
    sys.exit(main())
