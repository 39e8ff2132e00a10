"""The measures and the made-up texts of the benchmark of recall."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime

import pytest

from benchmarks.made_conversations import (
    NEEDLES,
    ONE_WORD,
    Collection,
    Probe,
    Said,
    captions,
    long_chat,
    updates,
)
from benchmarks.made_languages import LANGUAGES, short_texts
from benchmarks.made_memories import MadeTexts
from benchmarks.retrieval_report import Row, plot, row_table
from benchmarks.retrieval_scale import BASELINE, INSERT, RECALL, SEARCH, Found, Timing, growth_plot, rows
from benchmarks.retrieval_updates import Score, score

_STOP = {
    "a", "an", "and", "are", "as", "at", "be", "by", "did", "do", "does", "for", "from", "get", "has",
    "have", "how", "i", "in", "is", "it", "me", "my", "no", "not", "of", "on", "or", "our", "should", "that",
    "the", "there", "they", "to", "was", "were", "what", "when", "where", "which", "who", "with", "would",
}  # fmt: skip


def _words(text: str) -> set[str]:
    return set(re.findall(r"[\w']+", text.lower())) - _STOP


def test_scores_count_places_and_who_stands_above_whom() -> None:
    found = {
        "newest first": [3, 1],
        "outdated first": [5, 4],
        "only outdated": [6],
        "seventh": [0, 1, 2, 10, 11, 12, 9],
        "no match": [],
    }
    probes = [
        Probe(question="newest first", answer=3, outdated=(1,)),
        Probe(question="outdated first", answer=4, outdated=(5,)),
        Probe(question="only outdated", answer=7, outdated=(6,)),
        Probe(question="seventh", answer=9),
        Probe(question="no match", answer=2),
    ]
    assert score(probes, found.__getitem__) == Score(recall_5=2 / 5, recall_10=3 / 5, newest_first=1 / 3)


def test_where_nothing_changed_nothing_is_said_of_the_newest() -> None:
    assert score([Probe(question="q", answer=1)], lambda _: [1]).newest_first is None


def test_a_longer_list_of_memories_begins_with_the_shorter() -> None:
    first = list(itertools.islice(MadeTexts().memories(), 50))
    assert list(itertools.islice(MadeTexts().memories(), 200))[:50] == first
    assert all(5 <= len(text.split()) <= 40 for text in first)


def test_a_question_about_a_memory_has_its_words_and_only_those() -> None:
    texts = MadeTexts()
    for memory in itertools.islice(texts.memories(), 20):
        asked = texts.question_about(memory).rstrip("?").split()
        assert set(asked) <= set(memory.rstrip(".").split())
        assert len(asked) == len(set(asked)) <= 4


@pytest.mark.parametrize("pair", ONE_WORD, ids=lambda pair: pair[1])
def test_questions_of_one_word_share_one_word_with_their_answer(pair: tuple[str, str]) -> None:
    told, question = pair
    stems = [{word.rstrip("s") for word in _words(text)} for text in (told, question)]
    assert len(stems[0] & stems[1]) == 1


@pytest.mark.parametrize("as_messages", [False, True])
def test_answers_of_updates_stand_last_and_name_the_person(as_messages: bool) -> None:
    collection = updates(2_000, name="updates", as_messages=as_messages)
    assert len(collection.probes) == 240
    for probe in collection.probes:
        assert probe.outdated
        assert max(probe.outdated) < probe.answer
        common = _words(probe.question) & _words(collection.texts[probe.answer].text)
        for place in probe.outdated:
            assert collection.texts[place].at < collection.texts[probe.answer].at
            assert collection.texts[place].text != collection.texts[probe.answer].text
        assert common, probe.question


def test_updates_in_other_words_have_the_name_alone_in_common() -> None:
    collection = updates(2_000, name="updates", in_other_words=True)
    for probe in collection.probes:
        for place in (probe.answer, *probe.outdated):
            common = _words(probe.question.replace("'s", "")) & _words(
                collection.texts[place].text.replace("'s", "")
            )
            assert len(common) == 1, (probe.question, collection.texts[place].text)


@pytest.mark.parametrize(
    "collection",
    [
        long_chat(400, NEEDLES, name="chat"),
        captions(200),
        *(short_texts(language, 200) for language in LANGUAGES),
    ],
    ids=lambda collection: collection.name,
)
def test_what_is_asked_was_told_once(collection: Collection) -> None:
    texts = [said.text for said in collection.texts]
    places = [probe.answer for probe in collection.probes]
    assert len(set(places)) == len(places)
    for place in places:
        assert texts.count(texts[place]) == 1


def test_messages_have_their_place_in_a_session() -> None:
    texts = long_chat(200, NEEDLES, name="chat").texts
    assert texts[0] == Said(
        text=texts[0].text, at=datetime(2024, 1, 8, 9, 0, tzinfo=UTC), session=0, turn=1, speaker="user"
    )
    assert [(said.session, said.turn) for said in texts[58:62]] == [(0, 59), (0, 60), (1, 1), (1, 2)]
    assert len({(said.session, said.turn) for said in texts}) == len(texts) == 200


def _timing(what: str, in_scope: int, in_all: int, milliseconds: float) -> Timing:
    return Timing(
        what=what, in_scope=in_scope, in_all=in_all, p50_ms=milliseconds, p95_ms=2 * milliseconds,
        work_p50_ms=milliseconds, work_p95_ms=milliseconds,
    )  # fmt: skip


_MEASURED = ((1_000, 1_010, 1, 1), (10_000, 10_100, 6, 1.5), (10_000, 110_000, 4, 9))
_TIMINGS = [
    _timing(what, in_scope, in_all, milliseconds)
    for in_scope, in_all, search_ms, insert_ms in _MEASURED
    for what, milliseconds in (
        (SEARCH, search_ms), (RECALL, search_ms), (INSERT, insert_ms), (BASELINE, 10), (f"{INSERT}, {BASELINE}", 1),
    )
]  # fmt: skip


def test_goals_of_time_go_by_p95_and_by_the_scope_that_grew() -> None:
    found = Found(in_scope=10_000, in_all=10_100, ours=0.9, baseline=0.5)
    alone, among_others, insert, share = rows(_TIMINGS, [found])
    assert (alone.ours, alone.reached) == ("12.0 ms", False)
    assert (among_others.ours, among_others.reached) == ("8.0 ms", True)
    assert "110,000 in all" in among_others.measure
    assert insert.reached
    assert insert.ours.startswith("1.50 times")
    assert (share.ours, share.reached) == ("0.90", None)


def test_the_plot_has_a_point_per_size_and_is_xml() -> None:
    drawn = ET.fromstring(growth_plot(_TIMINGS))  # noqa: S314 (our own)
    assert len(drawn.findall("{*}polyline")) == 6
    assert len(drawn.findall("{*}circle")) == 12


def test_a_plot_keeps_the_order_of_its_values() -> None:
    drawn = ET.fromstring(plot("t", {"a": [(1, 1), (100, 10)]}, x="x", y="y"))  # noqa: S314 (our own)
    first, second = drawn.findall("{*}circle")
    assert float(first.attrib["cx"]) < float(second.attrib["cx"])
    assert float(first.attrib["cy"]) > float(second.attrib["cy"])


def test_what_was_not_measured_is_neither_reached_nor_missed() -> None:
    line = Row(measure="m", baseline="", goal="≥ 1", ours="not measured: no data", reached=None)
    assert row_table([line]).splitlines()[-1] == "| m |  | ≥ 1 | not measured: no data |  |"
