"""What the texts of a column look like: e-mail addresses, dates, currency codes and the like."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from agent.discovery.words import word_set

LEAST_SHARE: Final = 0.8
"""Least share of a column's different values that must look alike for the column to have a format."""
VALUE_LIMIT: Final = 200
"""Characters of a value that are read; a longer one is cut in the server."""

# ISO 4217, the currencies in use.
_CURRENCIES = word_set("""
    AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CLP
    CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG
    HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL
    MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR
    RON RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD
    TZS UAH UGX USD UYU UZS VED VES VND VUV WST XAF XCD XCG XOF XPF YER ZAR ZMW ZWG
    """)
_EMAIL = re.compile(r"[^\s@<>,;\"]{1,64}@[^\s@<>,;\"]+\.[^\s@<>,;\".]{2,}")
_URL = re.compile(r"[a-z][a-z0-9+.-]{1,15}://[^\s]+", re.IGNORECASE)
_UUID = re.compile(r"\{?[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\}?", re.IGNORECASE)
_ISO_DATE = re.compile(r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])")
_ISO_TIME = re.compile(
    _ISO_DATE.pattern + r"[T ](?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:\.\d+)?)?(?:Z|[+-]\d{2}(?::?\d{2})?)?"
)
# Digits in groups, or behind a plus or a leading zero: a bare number is a number.
_PHONE = re.compile(r"(?:\+|00|0|\()?\d[\d ().\-/]{5,20}\d(?:\s?(?:x|ext\.?)\s?\d{1,6})?", re.IGNORECASE)
_IBAN = re.compile(r"[A-Z]{2}\d{2}[A-Z0-9]{11,30}")
_CARD = re.compile(r"\d(?:[ -]?\d){12,18}")
_JWT = re.compile(r"eyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]{5,}(?:\.[A-Za-z0-9_-]*)?")
_HEX = re.compile(r"(?:\\x|0x)?(?:[0-9a-f]{32,}|[0-9A-F]{32,})")
_MAC = re.compile(r"[0-9a-f]{2}(?:[:-][0-9a-f]{2}){5}", re.IGNORECASE)
_DOMAIN = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,24}", re.IGNORECASE)
_INTEGER = re.compile(r"[+-]?\d{1,18}")
_GROUPED = re.compile(r"\d{1,3}(?:[., ]\d{3})+")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")


def is_email(text: str) -> bool:
    """One e-mail address, also with letters of other languages."""
    return _EMAIL.fullmatch(text) is not None


def is_phone(text: str) -> bool:
    """A telephone number as people write it: 7 to 15 digits with a plus, a leading zero or separators."""
    digits = sum(character.isdigit() for character in text)
    return (
        7 <= digits <= 15
        and _PHONE.fullmatch(text) is not None
        and (not text.isdigit() or text.startswith("0"))
        and _ISO_DATE.match(text) is None
        and not is_ip(text)
        and not _is_plain_number(text)
    )


def _is_plain_number(text: str) -> bool:
    is_number = _NUMBER.fullmatch(text) or _GROUPED.fullmatch(text)
    return is_number is not None and not text.startswith(("+", "0"))


def is_ip(text: str) -> bool:
    """An address or a network of version 4 or 6."""
    if not (":" in text or text.count(".") == 3) or len(text) > 49:
        return False
    try:
        ipaddress.ip_interface(text)
    except ValueError:
        return False
    return True


def is_iban(text: str) -> bool:
    """A bank account number whose check digits are right (ISO 13616)."""
    plain = text.replace(" ", "").upper()
    if _IBAN.fullmatch(plain) is None:
        return False
    return int("".join(str(int(character, 36)) for character in plain[4:] + plain[:4])) % 97 == 1


def is_card_number(text: str) -> bool:
    """The number of a payment card: 13 to 19 digits of a known network with the right check digit (Luhn)."""
    if _CARD.fullmatch(text) is None or text[0] not in "23456":
        return False
    digits = [int(character) for character in text if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_json(text: str) -> bool:
    """A JSON object or list; of one that was cut, the beginning."""
    if not text.startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except ValueError:
        return len(text) >= VALUE_LIMIT and text.startswith(('{"', "[{", '["'))
    return True


# In this order: the first that fits names the format.
_FORMATS: Final[Mapping[str, Callable[[str], object]]] = {
    "uuid": _UUID.fullmatch,
    "url": _URL.fullmatch,  # before e-mail: one with a password has an @
    "email": is_email,
    "iso_datetime": _ISO_TIME.fullmatch,
    "iso_date": _ISO_DATE.fullmatch,
    "json": _is_json,
    "jwt": _JWT.fullmatch,
    "ip": is_ip,
    "mac": _MAC.fullmatch,
    "iban": is_iban,
    "card_number": is_card_number,
    "hex": _HEX.fullmatch,
    "phone": is_phone,
    "currency": _CURRENCIES.__contains__,
    "integer": _INTEGER.fullmatch,
    "number": _NUMBER.fullmatch,
    "domain": _DOMAIN.fullmatch,
}


def format_of(values: Iterable[str]) -> tuple[str | None, float]:
    """The format that most of these different values have, and the share of them that fit.

    Returns:
        `(None, 0.0)` where no format fits `LEAST_SHARE` of them, or there is none that is not empty.
    """
    counts: dict[str, int] = {}
    total = 0
    for value in values:
        text = value.strip()
        if text:
            total += 1
            for name, fits in _FORMATS.items():
                if fits(text):
                    counts[name] = counts.get(name, 0) + 1
                    break
    if not counts:
        return None, 0.0
    if "integer" in counts and "number" in counts:
        counts["number"] += counts.pop("integer")
    name = max(counts, key=lambda found: counts[found])
    share = counts[name] / total
    return (name, round(share, 4)) if share >= LEAST_SHARE else (None, 0.0)
