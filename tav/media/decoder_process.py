"""The process that decodes one untrusted video: `python -m tav.media.decoder_process SOURCE FOLDER SETTINGS`.

It limits its own memory, file size and run time, reads the video, and leaves files in FOLDER: the frames, which it writes
one by one; an answer in JSON; and the audio, where the frames are all of a video that has any. `tav.media.decoding` starts
it and reads them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tav.config import DecodeParams
from tav.media.frame_readers import extract_audio, read_source
from tav_model.disk_space import explained_full_disk
from tav_model.errors import FullDiskError, TavError, first_line

if TYPE_CHECKING:
    import numpy as np

FRAMES_FILE, ANSWER_FILE, AUDIO_FILE = "frames.npy", "answer.json", "audio.m4a"


def main() -> int:
    """Read the frames of the video that the command line names.

    The answer has one of three keys: `fps`, the frame rate, with `available` and `size` as `Selection` has them; `error`, a
    message; `full_disk`, the number and the text of a system error. Beside `fps` there may be `no_audio`, why the audio
    could not be read.
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
        with contextlib.closing(FrameFile(folder / FRAMES_FILE, settings["memory"])) as frames:
            read = read_source(source, DecodeParams(**settings["decode"]), settings["reader"], frames)
        answer = {"fps": str(read.fps), "available": read.available, "size": read.size}
        if read.complete and settings["audio"]:
            answer |= _extract_audio(source, folder / AUDIO_FILE)
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


class FrameFile:
    """Frames as `numpy.save` writes them, one by one.

    Args:
        path: of the file.
        most: bytes that this process allows itself for a file; the user may have set a lower limit.
    """

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.most, self._count = path, most, 0
        self._file: BinaryIO | None = None

    def start(self, count: int) -> None:
        """Begin with an empty file."""
        self.close()
        self._count = count
        self._file = self.path.open("wb")

    def add(self, frame: np.ndarray) -> None:
        """Append a frame.

        Raises:
            FullDiskError: there is no space for it, or the file is larger than the user's limit.
            MemoryError: the file is larger than this process allows itself.
        """
        import numpy as np

        assert self._file is not None  # noqa: S101 (`start` has been called)
        try:
            with explained_full_disk(self.path):
                if not self._file.tell():
                    header = {"descr": "|u1", "fortran_order": False, "shape": (self._count, *frame.shape)}
                    np.lib.format.write_array_header_1_0(self._file, header)
                self._file.write(np.ascontiguousarray(frame).data)
        except OSError as error:
            if error.errno == errno.EFBIG and resource.getrlimit(resource.RLIMIT_FSIZE)[0] == self.most:
                raise MemoryError from None
            raise

    def close(self) -> None:
        """Write what is still in memory."""
        if self._file is not None:
            with explained_full_disk(self.path):
                self._file.close()


def _extract_audio(source: Path, path: Path) -> dict[str, str]:
    """Write the audio of a video; return why that failed, which is no reason to refuse the video."""
    try:
        with explained_full_disk(path):
            extract_audio(source, path)
    except FullDiskError:
        raise
    except Exception as error:
        path.unlink(missing_ok=True)
        return {"no_audio": first_line(error) or type(error).__name__}
    return {}


def _limit(kind: int, most: int) -> None:
    """Lower a resource limit of this process; a lower limit that the user has set stays."""
    current = [limit for limit in resource.getrlimit(kind) if limit != resource.RLIM_INFINITY]
    lowest = min([most, *current])
    resource.setrlimit(kind, (lowest, lowest))


if __name__ == "__main__":
    sys.exit(main())
