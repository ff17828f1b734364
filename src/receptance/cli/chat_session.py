"""A conversation as a position in the model's state: every turn feeds its own text and nothing again."""

from dataclasses import dataclass, replace

from receptance.engine.params import SamplingParams
from receptance.engine.protocols import Model, State
from receptance.generation import Generation, generate_tokens
from receptance.tokenizers import ChatTemplate, Thinking, Tokenizer

KEPT_TURNS = 100  # that can be undone or shown; older ones live on in the state, so that memory stays flat


@dataclass(frozen=True, eq=False)
class Turn:
    user: str
    reply: str
    before: "Position"


@dataclass(frozen=True, eq=False)
class Position:
    """A place in a conversation: all that its future depends on, and the turns that can be undone.

    state: None = the model's own start. is_begun: the state ends with a message, so the next one needs a separator.
    """

    state: State | None = None
    is_begun: bool = False
    turns: tuple[Turn, ...] = ()


class ChatSession:
    """A chat with one model. `position` moves only when a reply is accepted, so a broken turn leaves no trace."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        params: SamplingParams,
        *,
        system: str = "",
        thinking: Thinking = "off",
        start: Position | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.params = params
        self.system = system
        self.thinking: Thinking = thinking
        self.start = start or Position()  # where /reset leads
        self.position = self.start
        self.forks: dict[str, Position] = {}
        self._asked = 0

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self.position.turns

    @property
    def reply_prefix(self) -> str:
        """The beginning of the reply that the prompt already holds; shown before the reply."""
        return self.template.reply_prefix(self.thinking)

    def ask(self, text: str) -> Generation:
        """The reply to a message, to be iterated over and then given to `accept`."""
        messages = [{"role": "user", "content": text}]
        if self.position.is_begun:
            prompt = self.template.render_next(messages, thinking=self.thinking)
        else:
            system = [{"role": "system", "content": self.system}] if self.system else []
            prompt = self.template.render(system + messages, thinking=self.thinking)
        params = replace(self.params, stop=dict.fromkeys((*self.template.stop, *self.params.stop_strings)))
        if params.seed is not None:  # a turn of its own for every reply, or /regenerate would repeat it
            params = replace(params, seed=(params.seed + self._asked) % 2**64)
        self._asked += 1
        return generate_tokens(self.model, self.tokenizer, prompt, params=params, state=self.position.state)

    def accept(self, text: str, reply: Generation) -> None:
        """Make a finished or cancelled reply part of the conversation. One that never began is dropped."""
        if reply.finish_reason is None:
            return
        # the oldest kept turn forgets what came before it, or the chain of positions would hold every state
        turns = self.turns[-(KEPT_TURNS - 1) :]
        before = replace(self.position, turns=())
        self.position = Position(reply.state, True, (*turns, Turn(text, self.reply_prefix + reply.text, before)))

    def undo(self) -> Turn | None:
        """Take back the last turn and give it; None when there is none that can be taken back."""
        if not self.turns:
            return None
        *rest, last = self.turns
        self.position = replace(last.before, turns=tuple(rest))
        return last

    def reset(self) -> None:
        self.position = self.start

    def fork(self, name: str) -> None:
        """Remember this position under a name; `go_to` leads back to it, any number of times."""
        self.forks[name] = self.position

    def go_to(self, name: str) -> None:
        self.position = self.forks[name]

    def resume(self, state: State) -> None:
        """Go on from a state that was saved after a reply."""
        self.position = Position(state, is_begun=True)
