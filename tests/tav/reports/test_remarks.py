"""What is said about an edit besides its numbers."""

from __future__ import annotations

from tav.reports.remarks import edit_remarks
from tav_model.vocabulary import read_vocabulary
from toyworld import WEIGHTS

GOOD = {"frame_consistency": 0.97, "alignment_gain": 0.2}


def test_unknown_words_come_first_and_bad_scores_after() -> None:
    vocabulary, source = read_vocabulary(str(WEIGHTS)), {"frame_consistency": 0.98}
    assert edit_remarks("a red ball", GOOD, source, vocabulary, "toyworld") == []
    assert edit_remarks("a zebra", GOOD, source, None, "stable-diffusion-v1-5") == []
    assert edit_remarks("a zebra", {}, {}, vocabulary, "toyworld") == ['toyworld does not know "zebra"']
    remarks = edit_remarks("a zebra", {"frame_consistency": 0.5, "alignment_gain": -0.1}, source, vocabulary, "mine")
    assert [remark.partition(":")[0] for remark in remarks] == [
        'mine does not know "zebra"',
        "the prompt does not show",
        "the frames do not belong together",
    ]
