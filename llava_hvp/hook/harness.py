"""The results that lmms-eval writes in this process, for a record beside each."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from llava_hvp.errors import RecordError
from llava_hvp.files import write_json
from llava_hvp.pruning.record import answers_facts, record_path

HARNESS = "lmms_eval"
RESULTS, SAMPLES = "_results.json", "_samples_"


class HarnessResults:
    """Results files, known by their being opened for writing.

    lmms-eval names them by the time at its end, so that nothing says beforehand where they are.

    Attributes
    ----------
    paths : list[Path]
        of the results, in order of their writing
    """

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self._watches = False

    def watch(self) -> None:
        """Look at what is opened from now on, if this process runs lmms-eval; once is enough."""
        if not self._watches and HARNESS in sys.modules:
            self._watches = True
            sys.addaudithook(self._on_audit)

    def _on_audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not str(arguments[1]).startswith("w"):
            return
        name = arguments[0]
        if isinstance(name, str) and name.endswith(RESULTS):
            path = Path(os.path.abspath(name))
            if path not in self.paths:
                self.paths.append(path)

    def write_records(self, record: dict[str, Any]) -> str:
        """Write it beside each results file that is there; where they lie, in words.

        It names the answers too, and how many processes there are: it counts this one's images.

        Raises RecordError where it cannot be written.
        """
        said = ""
        for path in filter(Path.is_file, self.paths):
            prefix = path.name.removesuffix(RESULTS) + SAMPLES
            try:
                samples = sorted(path.parent.glob(f"{prefix}*.jsonl"))
                facts = {
                    "answers": answers_facts(path),
                    "samples": [answers_facts(each) for each in samples],
                    "processes": int(os.environ.get("WORLD_SIZE", "1")),
                }
                write_json(record_path(path), {**record, **facts})
            except OSError as error:
                raise RecordError(
                    f"{record_path(path)}: the record cannot be written: {error.strerror}. The "
                    f"results in {path} are complete, and stand without a record"
                ) from error
            said += f"; record: {record_path(path)}"
        return said
