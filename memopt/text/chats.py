"""Conversations, and prompts with completions: their ids, and which of them are answers."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from memopt.text.files import OtherKindError, Records
from memopt.text.templates import PLAIN, RenderError, Template, unforgeable_mark
from memopt.text.tokenizer import Tokenizer

#: The role whose messages are learned.
ANSWERS = "assistant"

BROKEN = "has answers that cannot be told apart in what the chat template renders"

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat(NamedTuple):
    """A conversation.

    Attributes:
        messages: Each with `role` and `content`, and with what else its template understands.
        tools: Descriptions of functions, for the template.
    """

    messages: Sequence[dict[str, Any]]
    tools: Any = None


class Completion(NamedTuple):
    """A text, and the one that is to follow it."""

    prompt: str
    completion: str


def chat_of(record: Any, field: str) -> Chat | Completion:
    """Returns the conversation in a field of a record, or its `prompt` and `completion`.

    Raises:
        OtherKindError: It is a conversation as ShareGPT writes it.
        ValueError: There is neither; says why, after a name for the record.

    Example:
        >>> chat_of({"prompt": "1 + 1 =", "completion": " 2"}, "messages")
        Completion(prompt='1 + 1 =', completion=' 2')
    """
    fields = record if isinstance(record, dict) else {}
    match fields.get(field, fields.get("conversations")):
        case [{"from": _, "value": _}, *_]:
            name = "" if field in fields else f" and 'conversations' to {field!r}"
            raise OtherKindError(
                "is of ShareGPT: messages need 'role' and 'content'; rename 'from' and 'value' "
                f"(human → user, gpt → assistant){name}"
            )
    if field in fields:
        return _conversation(fields[field], fields.get("tools"))
    if not {"prompt", "completion"} <= fields.keys():
        found = f"its fields: {', '.join(fields) or 'none'}"
        raise ValueError(f"has neither {field!r} nor 'prompt' and 'completion' ({found})")
    for name in ("prompt", "completion"):
        if not isinstance(fields[name], str):
            raise ValueError(f"has a {name} that is no text ({fields[name]!r:.20})")
    return Completion(fields["prompt"], fields["completion"])


def _conversation(messages: Any, tools: Any) -> Chat:
    if not (isinstance(messages, list) and messages):
        raise ValueError(f"has messages that are no list of messages ({messages!r:.20})")
    for number, message in enumerate(messages, 1):
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not (isinstance(role, str) and role):
            raise ValueError(f"has a message {number} without a role ({message!r:.40})")
        if not isinstance(content, str) and not (content is None and fields.get("tool_calls")):
            raise ValueError(f"has a message {number} whose content is no text ({content!r:.20})")
    # Readers of tables add keys that other messages have.
    kept = lambda name, value: value is not None or name == "content"
    messages = [{k: x for k, x in message.items() if kept(k, x)} for message in messages]
    answers = [i for i, message in enumerate(messages, 1) if message["role"] == ANSWERS]
    if not answers:
        raise ValueError(f"has no message of the role {ANSWERS!r}, whose messages are learned")
    return Chat(messages[: answers[-1]], tools)


#: What data for fine-tuning holds, see `memopt.text.documents.find_documents`.
CHATS = Records("chat", "messages", chat_of, in_every_file=True)


class ChatEncoder:
    """Makes ids of examples and says which are answers; to be used in `with`.

    A special token in the template is that token; written in a message it is plain text, so that
    nobody can end a turn by writing so. Otherwise the ids are those of transformers'
    `apply_chat_template`.

    Args:
        tokenizer: Makes ids of text.
        template: The chat template; None: the tokenizer's own or, without, `PLAIN`.

    Attributes:
        tokenizer: As given.
        template: The template in use.
        digest: A hash of everything that decides which ids an example becomes.
        eos_id: The id that ends a document.

    Example:
        >>> from memopt.text.tokenizer import load_tokenizer
        >>> tokenizer = load_tokenizer("bytes")
        >>> with ChatEncoder(tokenizer) as encoder:
        ...     ids, answers = encoder.encode(Completion("1 + 1 =", " 2"))
        >>> ids.tolist()
        [256, 49, 32, 43, 32, 49, 32, 61, 32, 50, 256]
        >>> tokenizer.decode(ids[answers])
        ' 2'
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None):
        self.tokenizer, self.eos_id = tokenizer, tokenizer.eos_id
        self.template = template or tokenizer.chat_template or PLAIN
        known = [tokenizer.digest, self.template, dict(tokenizer.variables)]
        self.digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
        names = list(tokenizer.special_tokens)
        self._plain, self._special = unforgeable_mark(), unforgeable_mark()
        self._numbers = {name: i for i, name in enumerate(names)}
        # The longest of several that begin alike, as tokenizers do.
        self._pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        self._escaped = re.compile(f"{self._plain}([0-9]+){self._plain}")
        self._names = names
        self._process: Template | None = None

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """The ids that begin a prompt without template."""
        return self.tokenizer.begin_ids

    def __enter__(self) -> "ChatEncoder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.close()
            self._process = None

    @property
    def _renderer(self) -> Template:
        """The template's process, started when the first conversation needs it."""
        if self._process is None:
            self._process = Template(self.template, self.tokenizer.variables)
        return self._process

    @functools.cached_property
    def _encode(self) -> Callable[[str], np.ndarray]:
        numbers = self._numbers.items()
        return self.tokenizer.encoder_with(
            {name: f"{self._special}{number}{self._special}" for name, number in numbers}
        )

    def encode(self, example: Chat | Completion) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of an example, int32 (tokens,), and whether each is of an answer, bool.

        The id that ends an answer belongs to it, and the ids before an answer are those of the
        conversation up to there alone, as the model will see it.

        Raises:
            ValueError: The template refuses it, renders a beginning of it otherwise than the whole,
                or leaves nothing to learn; says why, after a name for the example.
        """
        if isinstance(example, Completion):
            return self._encode_completion(example)
        text, answers = self._render(example)
        ids = self._encode_markup(text)
        learned = np.zeros(len(ids), bool)
        for before, through in answers:
            begin, end = (self._tokens_of(part, text, ids) for part in (before, through))
            learned[begin:end] = True
        if not learned[1:].any():  # nothing predicts the first token
            raise ValueError(f"{BROKEN}: it renders no token of them")
        return ids, learned

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> np.ndarray:
        """Returns the ids of a conversation that is to be answered, int32 (tokens,).

        Raises:
            ValueError: The template refuses it.
        """
        question = {"messages": self._escaped_copy(messages), "tools": tools}
        [text] = self._texts([question | {"add_generation_prompt": True}])
        return self._encode_markup(self._unmarked(text))

    def _encode_markup(self, text: str) -> np.ndarray:
        """Returns the ids of what a template rendered."""
        stand_in = lambda match: f"{self._special}{self._numbers[match[0]]}{self._special}"
        marked = self._pattern.sub(stand_in, text)
        return self._encode(self._escaped.sub(lambda match: self._names[int(match[1])], marked))

    def _encode_completion(self, example: Completion) -> tuple[np.ndarray, np.ndarray]:
        begin = np.array(self.tokenizer.begin_ids, np.int32)
        prompt = self.tokenizer.encode(example.prompt)
        both = self.tokenizer.encode(example.prompt + example.completion)
        if np.array_equal(both[: len(prompt)], prompt):
            answer = both[len(prompt) :]
        else:  # a token reaches over the border, where sampling begins with a new one
            answer = self.tokenizer.encode(example.completion)
        ids = np.concatenate([begin, prompt, answer, np.array([self.eos_id], np.int32)])
        return ids, np.arange(len(ids)) >= len(begin) + len(prompt)

    def _render(self, chat: Chat) -> tuple[str, list[tuple[str, str]]]:
        """The text of a conversation, and of its beginnings before and through each answer."""
        messages = self._escaped_copy(chat.messages)
        self._check_calls(messages, chat.tools)
        through = lambda count: {"messages": messages[:count], "tools": chat.tools}
        if _GENERATION.search(self.template):
            [text] = self._texts([through(len(messages))])
            count = sum(message["role"] == ANSWERS for message in messages)
            return self._unmarked(text), self._marked_answers(text, count)
        wanted = []
        for number, message in enumerate(messages):
            if message["role"] == ANSWERS:
                question = through(number) | {"add_generation_prompt": True}
                wanted += [question, through(number + 1)]
        texts = self._texts(wanted)
        answers = zip(texts[::2], map(self._without_end, texts[::2], texts[1::2]), strict=True)
        return texts[-1], list(answers)

    def _without_end(self, before: str, through: str) -> str:
        """A text without the space after the special token that ends its last answer."""
        *_, last = [0, *(match.end() for match in self._pattern.finditer(through))]
        return through if last <= len(before) or through[last:].strip() else through[:last]

    def _marked_answers(self, text: str, count: int) -> list[tuple[str, str]]:
        """The beginnings of a text up to the marks around each of so many answers."""
        begin, end = self._renderer.marks
        parts = re.split(f"({begin}|{end})", text)
        if parts[1::2] != [begin, end] * (len(parts) // 4):
            raise ValueError(f"{BROKEN}: its generation blocks are cut, or one in another")
        if len(parts) // 4 < count:
            raise ValueError(f"{BROKEN}: {len(parts) // 4} generation blocks for {count} answers")
        texts = ["".join(parts[: i + 1 : 2]) for i in range(0, len(parts) - 1, 2)]
        return list(zip(texts[::2], texts[1::2], strict=True))

    def _unmarked(self, text: str) -> str:
        begin, end = self._renderer.marks
        return text.replace(begin, "").replace(end, "")

    def _tokens_of(self, part: str, text: str, ids: np.ndarray) -> int:
        """The number of ids of a part, with which a text and its ids begin."""
        if not text.startswith(part):
            raise ValueError(f"{BROKEN}: it renders a beginning otherwise when more follows")
        own = self._encode_markup(part)
        if not np.array_equal(ids[: len(own)], own):
            raise ValueError(f"{BROKEN}: a token reaches over the border, near {part[-20:]!r}")
        return len(own)

    def _check_calls(self, messages: Sequence[dict[str, Any]], tools: Any) -> None:
        """Raises if the template leaves out what it is given of tools."""
        bare = [{k: x for k, x in message.items() if k != "tool_calls"} for message in messages]
        if tools is None and bare == messages:
            return
        given = {"messages": messages, "tools": tools}
        fewer = [{**given, **other} for other in ({"messages": bare}, {"tools": None})]
        text, *texts = self._texts([given, *(other for other in fewer if other != given)])
        if text in texts:
            raise ValueError("has tools or tool_calls, which the chat template leaves out")

    def _texts(self, wanted: Sequence[dict[str, Any]]) -> list[str]:
        try:
            return self._renderer.render(wanted)
        except RenderError as error:
            raise ValueError(f"is refused by the chat template: {error}") from error

    def _escaped_copy(self, value: Any) -> Any:
        """JSON in which special tokens, wherever they are written out, are numbers in marks."""
        if isinstance(value, str):
            number = lambda match: f"{self._plain}{self._numbers[match[0]]}{self._plain}"
            return self._pattern.sub(number, value)
        if isinstance(value, dict):
            return {self._escaped_copy(key): self._escaped_copy(x) for key, x in value.items()}
        return [self._escaped_copy(x) for x in value] if isinstance(value, list) else value
