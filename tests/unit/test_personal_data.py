"""Personal data is recognised by names of columns and by values, and what may be shown is little."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.discovery.personal_data import looks_secret, may_show, personal_by_name, personal_by_values
from agent.discovery.words import name_words


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("billingEMail_Address", ["billing", "email", "address"]),
        ("customerID", ["customer", "id"]),
        ("e_mail", ["email"]),
        ("HTTPServerName", ["http", "server", "name"]),
        ("Straße 1", ["strasse", "1"]),
        ("prénom", ["prenom"]),
        ("日本", []),
    ],
)
def test_names_are_taken_apart_into_words(name: str, words: list[str]) -> None:
    assert name_words(name) == words


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("email", "email"), ("useremail", "email"), ("contactEmail", "email"), ("correo_electronico", "email"),
        ("phone", "phone"), ("mobile_no", "phone"), ("telefonnummer_telefon", "phone"), ("custphone", "phone"),
        ("first_name", "name"), ("lastName", "name"), ("nachname", "name"), ("apellidos", "name"),
        ("full_name", "name"), ("username", "name"), ("created_by", "name"), ("owner", "name"),
        ("password_hash", "key"), ("api_key", "key"), ("accessToken", "key"), ("client_secret", "key"),
        ("otp", "key"), ("passwort", "key"), ("contraseña", "key"),
        ("iban", "bank"), ("bank_account_number", "bank"), ("card_number", "card"), ("cvv", "key"),
        ("date_of_birth", "birth"), ("dob", "birth"), ("geburtsdatum", "birth"), ("born_at", "birth"),
        ("ssn", "id_number"), ("tax_id", "id_number"), ("passport_number", "id_number"), ("dni", "id_number"),
        ("ip_address", "ip"), ("client_ip", "ip"), ("street", "address"), ("address2", "address"),
        ("zip_code", "address"), ("plz", "address"), ("gender", "sensitive"), ("salary", "sensitive"),
        ("diagnosis", "sensitive"), ("姓名", "name"), ("Телефон", "phone"), ("パスワード", "key"),
    ],
)  # fmt: skip
def test_the_name_of_a_column_tells(column: str, kind: str) -> None:
    assert personal_by_name("public", "things", column, "text") == kind


def test_a_town_is_personal_in_a_table_of_people_and_nowhere_else() -> None:
    assert personal_by_name("public", "customers", "city", "text") == "address"
    assert personal_by_name("public", "users", "home_town", "text") == "address"
    assert personal_by_name("public", "stores", "city", "text") is None
    assert personal_by_name("public", "customers", "city_id", "number") is None


@pytest.mark.parametrize(
    ("table", "column", "type_kind"),
    [
        ("products", "name", "text"),
        ("orders", "status", "text"),
        ("users", "email_verified", "boolean"),
        ("users", "email_status", "text"),
        ("users", "email_count", "number"),
        ("users", "email_sent_at", "time"),
        ("orders", "address_id", "number"),
        ("orders", "address_type", "text"),
        ("orders", "phone_id", "uuid"),
        ("films", "title", "text"),
    ],
)
def test_what_is_about_personal_data_is_none(table: str, column: str, type_kind: str) -> None:
    assert personal_by_name("public", table, column, type_kind) is None


def test_a_bare_name_is_personal_in_a_table_of_people() -> None:
    assert personal_by_name("public", "customers", "name", "text") == "name"
    assert personal_by_name("hr", "tbl_employee", "name", "text") == "name"


@pytest.mark.parametrize("schema", ["auth", "vault", "AUTH"])
@pytest.mark.parametrize("type_kind", ["text", "time", "number", "boolean", "enum", "other"])
def test_everything_in_the_schemas_of_secrets_is_personal(schema: str, type_kind: str) -> None:
    assert personal_by_name(schema, "things", "colour", type_kind) == "restricted"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["x", "y", "write to ada@example.com please"], "email"),
        (["x"] * 3 + ["DE89370400440532013000"], "bank"),
        (["x", "sk-live_4f3a9b8c7d6e5f4a3b2c1d"], "key"),
        (["x", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc"], "key"),
        (["x", "postgres://u:pw@host/db"], "key"),
        (["x", "aB3dE5fG7hI9jK1lM3"], "key"),
        (["4111111111111111", "5500005555555559", "x"], "card"),
        (["10.0.0.1", "10.0.0.2"], "ip"),
        (["+49 30 123456", "+49 30 123457"], "phone"),
        (["12 Main Street", "Hauptstraße 5", "rue de la Paix"], "address"),
        (["Alice Smith", "Bob", "Carlos Pérez", "Maria", "Müller"], "name"),
        (["open", "paid"], None),
        (["PG-13", "NC-17", "R"], None),
        (["d41d8cd98f00b204e9800998ecf8427e"], None),
        (["550e8400-e29b-41d4-a716-446655440000"], None),
        (["", " "], None),
    ],
)
def test_values_tell_where_the_name_does_not(values: list[str], kind: str | None) -> None:
    assert personal_by_values(values) == kind


@pytest.mark.parametrize(
    "label",
    [
        "open",
        "in_progress",
        "PG-13",
        "On hold",
        "v2",
        "EUR",
        "Größe M",
        "10",
        "2.5",
        "a/b",
        "50%",
        "New York",
    ],
)
def test_labels_may_be_shown(label: str) -> None:
    assert may_show(label)


@pytest.mark.parametrize(
    "value",
    [
        "", "ada@example.com", "Alice", "Alice Smith", "+49 30 123456", "10.0.0.1", "12 Main Street", "1234567",
        "sk-live_4f3a9b8c7d6e5f4a3b2c1d", "x" * 41, "2024-01-05", "a\nb", "<script>", "12345", "a;b", "'quoted'",
        "550e8400-e29b-41d4-a716-446655440000", "d41d8cd98f00b204",
        "correct horse battery staple is it not",
    ],
)  # fmt: skip
def test_what_may_be_about_somebody_is_not_shown(value: str) -> None:
    assert not may_show(value)


@given(st.text(alphabet=string.ascii_letters + string.digits, min_size=24, max_size=60))
def test_random_keys_are_never_shown(key: str) -> None:
    if sum(character.isdigit() for character in key) >= 2:
        assert not may_show(key)


@given(st.emails())
def test_mail_addresses_are_never_shown(address: str) -> None:
    assert not may_show(address)


@given(st.text(max_size=300))
def test_any_text_has_an_answer(text: str) -> None:
    assert may_show(text) in (True, False)
    assert looks_secret(text) in (True, False)
    personal_by_values([text])
    personal_by_name("public", text, text, "text")


@pytest.mark.parametrize(
    "identifier",
    [
        "task_executor_complete.rate", "NetworkTransmitThroughput", "workqueue_queue_seconds_p95",
        "Win32_NetworkAdapter::Status", "rs232SerialToMeterBridge",
    ],
)  # fmt: skip
def test_identifiers_of_several_words_are_no_secrets(identifier: str) -> None:
    assert not looks_secret(identifier)


@pytest.mark.parametrize(
    "key",
    ["sk_live_51H8abcdefgh1234", "key=AKIAIOSFODNN7EXAMPLE", "x ghp_16C7e42F292c6912E7710c838347Ae178B4a"],
)
def test_keys_with_a_known_beginning_are_secrets(key: str) -> None:
    assert looks_secret(key)


def test_a_string_is_no_street_and_an_alias_of_a_contact_is_a_name() -> None:
    assert personal_by_name("public", "profiles", "value_str", "text") is None
    assert personal_by_name("public", "icinga_contacts", "alias", "text") == "name"
    assert personal_by_name("public", "icinga_hosts", "alias", "text") is None
    assert personal_by_name("public", "muc_registered", "jid", "text") == "email"
