"""Telegram's Bot API over httpx."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from agent.chat.posting import post_json
from agent.errors import OperatorError

if TYPE_CHECKING:
    import httpx
    from pydantic import SecretStr


class TelegramRefused(OperatorError):
    """Telegram answered, and did not do it."""

    def __init__(self, message: str, retry_after: timedelta | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """How long Telegram wants to be left alone; `None`: it does not say."""


class TelegramBot:
    """Calls methods as one bot.

    Args:
        api_url: address of Telegram's interface.
        token: the bot's.
        client: that makes the requests; by default one for each.
    """

    def __init__(self, api_url: str, token: SecretStr, client: httpx.AsyncClient | None = None) -> None:
        self._address = f"{api_url.rstrip('/')}/bot"
        self._token = token
        self._client = client

    async def call(self, method: str, arguments: Mapping[str, Any], *, gone_is_fine: bool = False) -> Any:
        """What the method answers; `None` for a message that is gone or says it already, where that is fine.

        Raises:
            TelegramRefused: Telegram did not do it.
            OperatorError: Telegram could not be reached.
        """
        import httpx

        address = f"{self._address}{self._token.get_secret_value()}/{method}"
        try:
            response = await post_json(address, arguments, client=self._client)
            answer = response.json()
        except (httpx.HTTPError, ValueError) as error:  # whose words hold the address, and that the token
            raise OperatorError(
                f"Telegram could not be reached for {method}: {type(error).__name__}. It is tried again"
            ) from None
        if isinstance(answer, dict) and answer.get("ok") is True:
            return answer.get("result")
        why = str(answer.get("description", "")) if isinstance(answer, dict) else ""
        is_gone = any(
            word in why for word in ("not modified", "message to edit not found", "can't be edited")
        )
        if gone_is_fine and is_gone:
            return None  # it says what it should, or somebody deleted it: the row is the truth
        raise TelegramRefused(
            f"Telegram refused {method}: {why or f'status {response.status_code}'}", _wait_of(answer)
        )


def _wait_of(answer: Any) -> timedelta | None:
    parameters = answer.get("parameters") if isinstance(answer, dict) else None
    seconds = parameters.get("retry_after") if isinstance(parameters, dict) else None
    return timedelta(seconds=seconds) if isinstance(seconds, int) and 0 < seconds < 86_400 else None
