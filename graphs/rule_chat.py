"""A deterministic chat model for the sample graphs, where no model key is set.

It goes by the tables in `rules.py` and has no memory of its own: its answer is a function of the messages and the
tools it is given. So whatever it knows about a person, it found in its prompt.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolCall, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from agent.testing.scripted_chat import as_message, in_chunks
from graphs import rules
from graphs.known_facts import Fact, known_facts, preferred_name, preferred_style

NOTICE = "(I am a small rule-based stand-in, because no model key is set.)"
REVIEWER = "quality_assurance"
"""Name on the message by which a reviewer sends an answer back; it is not taken for the customer's."""

_SAID_CHARACTERS_MAX = 8_000
"""The rules read no further into a message: some of their patterns take quadratic time."""
_PROFILE_TOOL = "update_user_profile"
_MEMORY_TOOL = "save_user_memory"
_LEARNING_TOOLS = (_PROFILE_TOOL, _MEMORY_TOOL)


class RuleChat(BaseChatModel):
    """A small rule-based stand-in for a chat model: tools, streaming and the two forms of the support team."""

    @property
    def _llm_type(self) -> str:
        return "rule-chat"

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with these tools."""
        return self.bind(
            tools=[convert_to_openai_tool(tool) for tool in tools], tool_choice=tool_choice, **kwargs
        )

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=_message(messages, kwargs))])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._generate(messages, stop, **kwargs)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        yield from in_chunks(_message(messages, kwargs))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in in_chunks(_message(messages, kwargs)):
            yield chunk


@dataclass(frozen=True)
class _Result:
    """What a tool answered."""

    tool: str
    text: str
    is_error: bool

    @classmethod
    def of(cls, message: ToolMessage, names: dict[str, str]) -> _Result:
        # Name and status do not travel in every protocol: the id and the text do.
        text = message.text.strip() or "no answer came back"
        is_error = message.status == "error" or text.startswith("Error: ")
        text = text.removeprefix("Error: ")
        if fence := rules.FENCED_RESULT.search(text):
            text = fence["data"]
        return cls(
            names.get(message.tool_call_id, message.name or ""),
            text if text[-1] in ".!?" else f"{text}.",
            is_error,
        )


@dataclass(frozen=True)
class _Prompt:
    """What the model was sent, taken apart."""

    facts: tuple[Fact, ...]
    said: tuple[str, ...]
    """What the person said in this conversation, newest first; never empty."""
    results: tuple[_Result, ...]
    """Of the tools called since the person last spoke."""
    is_sent_back: bool
    """Whether a reviewer wants another answer."""
    is_first_answer: bool
    tools: dict[str, dict[str, Any]]
    """Tool name -> JSON schema of its arguments."""
    position: int
    """Number of messages, which makes ids of tool calls differ within a conversation."""

    @classmethod
    def of(cls, messages: Sequence[BaseMessage], tools: Sequence[dict[str, Any]]) -> _Prompt:
        people = [index for index, message in enumerate(messages) if _is_person(message)]
        since = messages[people[-1] + 1 :] if people else messages
        functions = [tool.get("function", tool) for tool in tools]
        calls = [call for message in since if isinstance(message, AIMessage) for call in message.tool_calls]
        names = {call["id"] or "": call["name"] for call in calls}
        return cls(
            facts=known_facts(message.text for message in messages if isinstance(message, SystemMessage)),
            said=tuple(messages[index].text[:_SAID_CHARACTERS_MAX] for index in reversed(people)) or ("",),
            results=tuple(
                _Result.of(message, names) for message in since if isinstance(message, ToolMessage)
            ),
            is_sent_back=any(isinstance(message, HumanMessage) for message in since),
            is_first_answer=not any(isinstance(message, AIMessage) and message.text for message in messages),
            tools={
                function["name"]: function.get("parameters") or {}
                for function in functions
                if "name" in function
            },
            position=len(messages),
        )


@dataclass(frozen=True)
class _Answer:
    """The same answer at two lengths."""

    short: str
    """One sentence."""
    long: str
    is_addressed: bool = True
    """Whether the short form may end with the person's name."""


def _is_person(message: BaseMessage) -> bool:
    return isinstance(message, HumanMessage) and message.name != REVIEWER


def _message(messages: list[BaseMessage], options: dict[str, Any]) -> AIMessage:
    prompt = _Prompt.of(messages, options.get("tools") or ())
    for form, fill in _FORMS.items():
        if form in prompt.tools:
            return _calling(prompt, [(form, fill(prompt))], messages)
    if not prompt.results and (calls := _calls(prompt)):
        return _calling(prompt, calls, messages)
    answer = _answer_from_results(prompt) if prompt.results else _answer(prompt)
    return as_message(_worded(prompt, answer), messages, has_tools=False)


def _calling(
    prompt: _Prompt, calls: list[tuple[str, dict[str, Any]]], messages: list[BaseMessage]
) -> AIMessage:
    tool_calls = []
    for name, args in calls:
        made_from = json.dumps([prompt.position, prompt.said, name, args], sort_keys=True)
        call_id = f"call_{hashlib.blake2b(made_from.encode(), digest_size=9).hexdigest()}"
        tool_calls.append(ToolCall(name=name, args=args, id=call_id))
    return as_message(AIMessage("", tool_calls=tool_calls), messages, has_tools=True)


def _worded(prompt: _Prompt, answer: _Answer) -> str:
    name = preferred_name(prompt.facts, prompt.said)
    if preferred_style(prompt.facts, prompt.said) == "concise":
        is_named = name and answer.is_addressed and answer.short.endswith(".")
        text = f"{answer.short[:-1]}, {name}." if is_named else answer.short
    else:
        text = f"Hello {name}! {answer.long}" if name and prompt.is_first_answer else answer.long
    if prompt.is_sent_back and rules.FAILURE in text:
        text = f"{text} {rules.NEXT_STEP}"
    return f"{NOTICE} {text}" if prompt.is_first_answer else text


# --- tools ------------------------------------------------------------------------------------------------------


def _calls(prompt: _Prompt) -> list[tuple[str, dict[str, Any]]]:
    """Everything to be done at once: what to keep about the person, and what they want done."""
    calls = _learning_calls(prompt)
    if operation := _operation(prompt):
        return [*calls, operation]
    wish = _wish(prompt)
    if wish and not wish.missing:
        calls.append((wish.tool, wish.arguments))
    return calls


def _learning_calls(prompt: _Prompt) -> list[tuple[str, dict[str, Any]]]:
    if not prompt.tools.keys() & set(_LEARNING_TOOLS):
        return []
    fields = prompt.tools.get(_PROFILE_TOOL, {}).get("properties", {})
    update: dict[str, Any] = {}
    memories: list[dict[str, Any]] = []
    for statement, value in _statements(prompt.said[0]):
        field = next((field for field in statement.fields if field in fields), None)
        if field:
            update[field] = _fitting(
                statement.field_value.format(value=value), fields[field], update.get(field)
            )
        elif _MEMORY_TOOL in prompt.tools:
            content = statement.memory.format(value=value)
            memories.append(
                {"content": content[0].upper() + content[1:], "memory_type": statement.memory_type}
            )
    cleared = [found["field"].lower().replace("time zone", "timezone").replace(" ", "_")
               for found in rules.FORGET.finditer(prompt.said[0])]  # fmt: skip
    if cleared and "clear_fields" in fields:
        update["clear_fields"] = [field for field in cleared if field in fields]
    return [*([(_PROFILE_TOOL, update)] if update else []), *((_MEMORY_TOOL, memory) for memory in memories)]


def _statements(text: str) -> list[tuple[rules.Statement, str]]:
    found = [(match.start(), statement, match["value"].strip())
             for statement in rules.STATEMENTS for match in statement.pattern.finditer(text)]  # fmt: skip
    return [(statement, value) for _, statement, value in sorted(found, key=lambda entry: entry[0])]


def _fitting(value: str, schema: dict[str, Any], before: Any) -> Any:
    """The value in the type that the field has: some schemas keep a list of preferences, some a text."""
    types = {option.get("type") for option in (schema, *schema.get("anyOf", ()))}
    if "array" in types:
        return [*(before or []), value]
    return f"{before}; {value}" if before else value


def _operation(prompt: _Prompt) -> tuple[str, dict[str, Any]] | None:
    """What an operations agent is told to do: a tool by name, a tool to keep, a statement, or words for one."""
    said = prompt.said[0]
    if (found := rules.USE_TOOL.search(said)) and found["name"] in prompt.tools:
        return (
            (found["name"], arguments) if (arguments := _document(found["arguments"])) is not None else None
        )
    if "create_new_tool" in prompt.tools and (found := rules.NEW_TOOL.search(said)):
        form = _document(found["form"]) or {}
        described = {
            "name": found["name"],
            "description": found["description"].strip(),
            "code": found["code"],
        }
        return "create_new_tool", described | {
            "parameters": form.get("parameters", {}),
            "examples": form.get("examples", []),
        }
    if "execute_sql" not in prompt.tools:
        return None
    for pattern, statement in rules.QUERIES:
        if found := pattern.search(said):
            words = {
                name: value.upper() if name.endswith("_id") else value.lower()
                for name, value in found.groupdict().items()
            }
            return "execute_sql", {"sql": statement.format(**words)}
    found = rules.SQL.search(said)
    return ("execute_sql", {"sql": found["value"].strip()}) if found else None


def _document(text: str) -> dict[str, Any] | None:
    """A JSON object, or `None` where the text is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class _Wish:
    """A tool that grants what was said, and its arguments as far as they were said."""

    tool: str
    arguments: dict[str, Any]
    missing: tuple[str, ...]
    """Arguments that must be asked for."""


def _wish(prompt: _Prompt) -> _Wish | None:
    """What the person wants. A bare "A1001" completes what they wanted before, if only that was missing."""
    last, *earlier = prompt.said
    if rules.ALL_ABOUT_ME.search(last):
        return None
    if tool := _granting(rules.ACTIONS, prompt, last):
        return _filled(prompt, tool, [last], earlier)
    if earlier and _has_slot(last) and (tool := _granting(rules.ACTIONS, prompt, earlier[0])):
        before = _filled(prompt, tool, earlier[:1], earlier[1:])
        if before.missing:
            return _filled(prompt, tool, [last, earlier[0]], earlier[1:])
    tool = _granting(rules.BARE_NUMBERS, prompt, last)
    return _filled(prompt, tool, [last], []) if tool else None


def _granting(actions: Sequence[rules.Action], prompt: _Prompt, text: str) -> str | None:
    bound = (action for action in actions if action.tool in prompt.tools)
    return next((action.tool for action in bound if action.pattern.search(text)), None)


def _has_slot(text: str) -> bool:
    return any(slot.pattern and slot.pattern.search(text) for slot in rules.SLOTS.values())


def _filled(prompt: _Prompt, tool: str, wish: list[str], earlier: list[str]) -> _Wish:
    """The arguments of a tool. What it needs may have been said earlier; an option counts only with the wish."""
    schema = prompt.tools[tool]
    required = [name for name in schema.get("required", ()) if name in rules.SLOTS]
    arguments: dict[str, Any] = {}
    for name in schema.get("properties", {}):
        if name not in rules.SLOTS:
            continue
        for text in (*wish, *earlier) if name in required else wish:
            if (value := _slot_value(rules.SLOTS[name], text)) is not None:
                arguments[name] = value
                break
    return _Wish(tool, arguments, tuple(name for name in required if name not in arguments))


def _slot_value(slot: rules.Slot, text: str) -> str | float | None:
    if slot.pattern is None:
        # A bare number says which, not what.
        return text.strip() if len(text.split()) > 1 else None
    found = slot.pattern.search(text)
    if found is None:
        return None
    match slot.kind:
        case "code":
            return found["value"].upper()
        case "number":
            number = float(found["value"])
            return int(number) if number.is_integer() else number
        case _:
            return found["value"].strip()


# --- answers ----------------------------------------------------------------------------------------------------


def _answer_from_results(prompt: _Prompt) -> _Answer:
    told = [_told(result) for result in prompt.results]
    short = "; ".join(text.rstrip(".") for text in told) + "."
    is_done = not any(result.is_error for result in prompt.results)
    long = " ".join([*told, "Is there anything else I can do for you?"] if is_done else told)
    return _Answer(
        short, long, is_addressed=all(result.tool not in _LEARNING_TOOLS for result in prompt.results)
    )


def _told(result: _Result) -> str:
    if not result.is_error:
        return result.text
    return (
        f"I could not save that: {result.text}"
        if result.tool in _LEARNING_TOOLS
        else f"{rules.FAILURE}{result.text}"
    )


def _answer(prompt: _Prompt) -> _Answer:
    said = prompt.said[0]
    if rules.ALL_ABOUT_ME.search(said):
        return _everything_known(prompt)
    if wish := _wish(prompt):
        question = rules.SLOTS[wish.missing[0]].question
        return _Answer(question, f"I can do that. {question}")
    if rules.QUESTION.search(said) and rules.ABOUT_ME.search(said):
        return _known_about(prompt, said)
    if _statements(said):
        return _Answer("Thank you for telling me.", "Thank you for telling me. What can I do for you?")
    abilities = _abilities(prompt)
    if rules.CASUAL_GREETING.search(said):
        return _Answer("What can I do for you?", f"What can I do for you? {abilities}")
    return _Answer(abilities, f"I did not find anything to do in that. {abilities}")


def _everything_known(prompt: _Prompt) -> _Answer:
    if not prompt.facts:
        return _Answer(
            "I know nothing about you yet.", "I know nothing about you yet. Tell me, and I may learn it."
        )
    lines = [fact.text for fact in prompt.facts]
    return _Answer(
        f"I know this about you: {'; '.join(line.rstrip('.') for line in lines)}.",
        "From earlier conversations I know this about you:\n" + "\n".join(f"- {line}" for line in lines),
        is_addressed=False,
    )


def _known_about(prompt: _Prompt, question: str) -> _Answer:
    words = set(re.findall(r"\w+", question.lower()))
    fields = {field for word, related in rules.WORDS_FOR_FIELDS.items() if word in words for field in related}
    wanted = _stems(question) | _stems(" ".join(fields))
    lines = [fact.text for fact in prompt.facts if wanted & _stems(fact.text)]
    if not lines:
        return _Answer("I do not know that.", f"I do not know that about you. {_abilities(prompt)}")
    text = f"From earlier conversations I know: {'; '.join(line.rstrip('.') for line in lines)}."
    return _Answer(text, f"{text} Is there anything else I can do for you?", is_addressed=False)


def _stems(text: str) -> set[str]:
    return {word[:4] for word in re.findall(r"\w{4,}", text.lower()) if word not in rules.COMMON_WORDS}


def _abilities(prompt: _Prompt) -> str:
    able = [ability for tool, ability in rules.CAPABILITIES.items() if tool in prompt.tools]
    return f"I can {', '.join(able)}." if able else "I can talk, and have no tools here."


# --- the support team's forms -----------------------------------------------------------------------------------


def _intake(prompt: _Prompt) -> dict[str, Any]:
    escalate = bool(rules.ESCALATE.search(prompt.said[0]))
    for said in prompt.said:
        hits = {category: len(words.findall(said)) for category, words in rules.CATEGORIES}
        best = max(hits, key=lambda category: hits[category])
        if hits[best]:
            confidence = round(hits[best] / sum(hits.values()), 2)
            return {
                "category": best,
                "confidence": confidence,
                "escalate": escalate,
                "reason": f"words of {best}",
            }
    return {
        "category": rules.CATEGORY_OF_THE_REST,
        "confidence": rules.CONFIDENCE_OF_THE_REST,
        "escalate": escalate,
        "reason": "no word of any category",
    }


def _review(prompt: _Prompt) -> dict[str, Any]:
    found = re.search(r"<draft>(.*?)(?:</draft>|\Z)", prompt.said[0], re.DOTALL)
    draft = html.unescape(found[1]) if found else ""
    for fault, reason in rules.REVIEW_SENDS_BACK:
        if fault.search(draft):
            return {"verdict": "send_back", "reason": reason}
    return {"verdict": "approve", "reason": "It answers the customer."}


_FORMS: dict[str, Callable[[_Prompt], dict[str, Any]]] = {"Intake": _intake, "Review": _review}
"""Structured answers it can give, by the name of their class."""
