"""Conversations in LoCoMo's format: turns, and questions with the turns that hold the evidence.

The data is CC BY-NC 4.0, for testing only, and not shipped. A turn's text is what was said and the caption of its
picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
_TIME = "%I:%M %p on %d %B, %Y"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message."""

    session: int
    number: int
    """Place in its session, from 1."""
    speaker: str
    is_first_speaker: bool
    text: str
    said_at: datetime

    def learning(self) -> dict[str, Any]:
        """As `upsert_learnings` takes it."""
        return {
            "store": "conversation",
            "kind": "user" if self.is_first_speaker else "assistant",
            "session_id": f"session-{self.session}",
            "turn": self.number,
            "speaker": self.speaker,
            "content": self.text,
            "valid_from": self.said_at.isoformat(),
            "trust": "user",
        }


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked; `evidence` are places in `Conversation.turns`."""

    text: str
    category: int
    evidence: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One conversation of two people over many sessions."""

    name: str
    turns: list[Turn]
    questions: list[Question]
    """Those with labelled evidence."""


def conversations(files: Iterable[Path]) -> list[Conversation]:
    """All conversations of the files, in order."""
    return [_conversation(sample) for file in files for sample in json.loads(file.read_text())]


def _conversation(sample: dict[str, Any]) -> Conversation:
    said = sample["conversation"]
    turns: list[Turn] = []
    places: dict[tuple[int, int], int] = {}
    sessions = sorted(int(key.removeprefix("session_")) for key in said if re.fullmatch(r"session_\d+", key))
    for session in sessions:
        began = datetime.strptime(said[f"session_{session}_date_time"], _TIME).replace(tzinfo=UTC)
        for number, turn in enumerate(said[f"session_{session}"] or [], 1):
            places[_labels(turn["dia_id"])[0]] = len(turns)
            caption = f" [image: {turn['blip_caption']}]" if turn.get("blip_caption") else ""
            turns.append(
                Turn(
                    session=session,
                    number=number,
                    speaker=turn["speaker"],
                    is_first_speaker=turn["speaker"] == said["speaker_a"],
                    text=turn["text"] + caption,
                    said_at=began + timedelta(seconds=number),
                )
            )
    questions = []
    for asked in sample["qa"]:
        labels = [label for text in asked.get("evidence") or [] for label in _labels(text)]
        if evidence := frozenset(places[label] for label in labels if label in places):
            questions.append(Question(text=asked["question"], category=asked["category"], evidence=evidence))
    return Conversation(name=sample["sample_id"], turns=turns, questions=questions)


def _labels(text: str) -> list[tuple[int, int]]:
    """Session and turn of labels such as `D8:6; D9:17`, which are not all written alike."""
    return [(int(session), int(turn)) for session, turn in re.findall(r"D:?(\d+):(\d+)", text)]
