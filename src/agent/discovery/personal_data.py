"""Which columns hold personal data, told by their names and by their values, and which values may be shown at all.

It errs towards silence: of a column that may be personal only the shape is kept. A value is shown only if its column
is not personal, it reads as a label, and it occurs several times.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from agent.discovery.formats import is_card_number, is_iban, is_ip, is_phone
from agent.discovery.given_names import GIVEN_NAMES
from agent.discovery.words import name_words, plain_letters, word_set

LABEL_LENGTH_MAX: Final = 40
"""Characters of the longest value that is still a label; a longer one is text that somebody wrote."""

RESTRICTED_SCHEMAS: Final = frozenset({"auth", "vault", "pgsodium", "secrets", "credentials", "pii"})
"""All columns of these schemas are personal, whatever they are called."""


# Words of column names by what they tell, as stems that are compared with whole words or, in names that are written
# without separators, with their ends. English, German, French, Spanish, Portuguese, Italian, Dutch and Polish.
_WORDS: Final[Mapping[str, str]] = {
    "key": """
        password passwd pwd pw pass passphrase passcode passwort kennwort contrasena clave motdepasse mdp senha
        wachtwoord haslo secret secrets geheimnis secreto segredo token tokens jwt apikey accesskey privatekey
        secretkey credential credentials bearer signature otp totp mfa pin cvv cvc csc salt cookie session
        sessionid nonce challenge verifier recovery backupcode webhooksecret hash digest encrypted ciphertext
        seed mnemonic dsn
        """,
    "email": "email emails mail mails mailaddress emailaddress correo courriel jid",
    "phone": """
        phone phones telephone telefon telefono telefone telephon tel mobile mobil movil celular cell cellphone
        handy portable fax msisdn whatsapp telefoonnummer numertelefonu
        """,
    "card": "card cardnumber creditcard pan ccnumber ccnum karte kartennummer tarjeta kreditkarte",
    "bank": "iban bic swift accountnumber bankaccount routingnumber sortcode kontonummer kontonr cuenta bankverbindung",
    "birth": """
        birth birthday birthdate dob dateofbirth born bday geburtstag geburtsdatum geburt naissance nacimiento
        nascimento nascita geboortedatum urodzenia yob
        """,
    "id_number": """
        ssn sin nin socialsecurity nationalid passport passportnumber taxid taxnumber vat driverlicense
        driverslicense licenseplate licenceplate numberplate identitycard idcard personalausweis ausweis
        steuernummer steuerid sozialversicherungsnummer dni nie nif cpf cnpj curp rfc pesel bsn nhs aadhaar
        pasaporte passeport
        """,
    "ip": """
        ip ipaddress ipaddr remoteaddr clientip hostaddr useragent fingerprint deviceid imei imsi macaddress idfa gaid
        """,
    "address": """
        address addresses addr address1 address2 addressline street streetaddress strasse hausnummer
        anschrift adresse adresa direccion calle endereco rua indirizzo straat adres ulica rue zip zipcode
        postcode postalcode postal plz codigopostal codepostal latitude longitude lat lng lon geolocation gps
        geom geog coordinates
        """,
    "name": """
        firstname lastname fullname middlename surname forename givenname familyname maidenname displayname
        username nickname screenname login userlogin handle realname personname customername contactname vorname
        nachname familienname benutzername nom prenom nombre apellido apellidos nome cognome sobrenome voornaam
        achternaam imie nazwisko author assignee reporter signatory recipient sender beneficiary contactperson
        ansprechpartner initials
        holder cardholder accountholder spouse mother father guardian avatar photo portrait selfie
        """,
    "sensitive": """
        gender sex geschlecht sexe sexo genero religion confession ethnicity ethnic race nationality citizenship
        diagnosis diagnose disease illness disability medication allergy bloodtype blood pregnant sexual
        orientation political union criminal conviction marital health salary income wage gehalt salaire salario
        sueldo einkommen
        """,
    # Of an audit: whatever column it tells of.
    "mixed": "oldvalue newvalue valueold valuenew previousvalue olddata newdata oldrow newrow",
}
_CLASS_OF_WORD: Final = {word: kind for kind, words in _WORDS.items() for word in words.split()}
# Long enough that a name which ends with them means them, as `useremail` does.
_ENDINGS: Final = tuple(word for word in _CLASS_OF_WORD if len(word) >= 5)
# Parts of names in letters that are not Latin: Chinese, Japanese and Russian.
_OTHER_LETTERS: Final = {
    "姓名": "name", "名前": "name", "氏名": "name", "имя": "name", "фамил": "name", "фио": "name",
    "电话": "phone", "電話": "phone", "手机": "phone", "телефон": "phone",
    "邮箱": "email", "メール": "email", "почт": "email",
    "密码": "key", "パスワード": "key", "парол": "key", "токен": "key",
    "身份证": "id_number", "паспорт": "id_number", "снилс": "id_number",
    "地址": "address", "住所": "address", "адрес": "address",
    "生日": "birth", "誕生日": "birth", "рожден": "birth", "银行卡": "bank", "工资": "sensitive",
}  # fmt: skip
_PEOPLE: Final = word_set("""
    user users customer customers client clients person persons people contact contacts employee employees staff
    patient patients member members student students teacher teachers profile profiles account accounts lead
    leads guest guests passenger passengers driver drivers applicant applicants candidate candidates subscriber
    subscribers owner owners author authors actor actors agent agents doctor doctors nurse tenant resident
    residents recipient recipients kunde kunden benutzer nutzer mitarbeiter personen cliente clientes usuario
    usuarios persona personas empleado empleados client personne personnes utilisateur utilisateurs utente
    utenti dipendente pessoa pessoas klant klanten gebruiker klient klienci osoba pracownik
    """)
# Where somebody lives, in a table of people; in one of shops or countries it is a place.
_TOWNS: Final = word_set(
    "city town village locality suburb ort wohnort stadt ville ciudad cidade citta plaats miasto"
)
# Columns in which people write what they like.
_WRITTEN: Final = word_set(
    """
    note notes comment comments remark remarks description message messages body text memo bio about feedback reason
    complaint review summary transcript answer question content kommentar bemerkung notiz beschreibung nachricht
    commentaire remarque comentario nota notas descripcion mensaje observacao descricao commento descrizione opmerking
    """
)
_ONE_PERSON: Final = word_set("owner contact agent person customer user client employee manager")
# What a name ends with when it tells about a thing and does not hold it: `email_status`, `address_type`, `name_count`.
_ABOUT: Final = word_set("""
    type types kind status state count counts total verified enabled disabled confirmed valid required optional
    format length size category level flag allowed preference source method provider version limit attempts
    expiry expires template
    """)
# Classes that a column of this kind of type can hold at all.
_OF_TYPES: Final[Mapping[str, frozenset[str]]] = {
    "boolean": frozenset({"sensitive"}),
    "time": frozenset({"birth"}),
    "number": frozenset({"key", "phone", "card", "bank", "birth", "id_number", "address", "sensitive"}),
    "enum": frozenset({"sensitive"}),
}
_STRONG_KEYS = re.compile(
    # At the begin of a word and with a digit: `task_executor_complete` is no `sk_…`.
    r"(?<![A-Za-z0-9])(?:eyJ[A-Za-z0-9_-]{8,}\."
    r"|(?:(?:sk|pk|rk|whsec|xox[abeprs]|gh[pousr]|glpat|github_pat|shpat|sbp|npm)[-_]|AIza|AKIA|ASIA)"
    r"(?=[-_A-Za-z]*\d)[-_A-Za-z0-9]{12,})"
    r"|-----BEGIN |\$2[aby]\$\d\d\$|\$argon2|\$scrypt\$|pbkdf2|\$[156]\$|SCRAM-SHA-|[a-z]+://[^/\s:@]+:[^/\s@]+@"
)
_OPAQUE = re.compile(r"[A-Za-z0-9+/_=.~-]{16,}")
_PIECE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")
_PIECE_MEAN = (
    3  # characters, of an identifier in several words; those of a random text are shorter than 2.5 on average
)
_INSIDE = re.compile(r"[^\s@<>,;\"]+@[^\s@<>,;\"]+\.\w{2,}")
_STREET = re.compile(
    r"(?:\d{1,5}[a-z]?,? .*\b(?:st|street|ave|avenue|rd|road|blvd|boulevard|lane|ln|drive|dr|court|ct|way|place)\b\.?)"
    r"|(?:.*(?:stra(?:ß|ss)e|str\.|weg|platz|gasse|allee)\s+\d{1,4}\s?[a-z]?)"
    r"|(?:(?:\d{1,4},? )?(?:rue|avenue|calle|via|viale|rua|plaza|piazza|ulica|ul\.)\s.+)",
    re.IGNORECASE,
)
_NAME_SHAPE = re.compile(r"[^\W\d_]+(?:[-'\u2019 ]\s?[^\W\d_]+\.?){0,3},?")
# Words of letters and short numbers, with the separators that labels have.
_LABEL = re.compile(
    r"(?:[^\W\d_]{1,24}\d{0,3}|\d{1,4})(?:[ _./:&+,-]{1,3}(?:[^\W\d_]{1,24}\d{0,3}|\d{1,4})){0,4}[%+]?"
)


def is_restricted(schema: str) -> bool:
    """Whether all columns of this schema are personal."""
    return schema.lower() in RESTRICTED_SCHEMAS


def is_written_by_people(column: str) -> bool:
    """Whether a column is made for free text, so that even what repeats in it is not a label."""
    return bool(_WRITTEN & set(name_words(column)))


def personal_by_name(schema: str, table: str, column: str, type_kind: str) -> str | None:
    """The class of personal data that names tell, or `None`.

    Args:
        schema: the table's schema; everything in `RESTRICTED_SCHEMAS` is `restricted`.
        table: a bare `name` or `city` is personal in a table of people, and not in one of products.
        column: the column.
        type_kind: `boolean`, `time`, `number`, `enum` or another; a flag such as `email_verified` holds no address.
    """
    if is_restricted(schema):
        return "restricted"
    words = name_words(column)
    kind = _class_of(words) or next(
        (kind for part, kind in _OTHER_LETTERS.items() if part in column.lower()), None
    )
    people = bool(_PEOPLE & set(name_words(table)))
    if kind is None and type_kind == "text":
        is_named = words[-1:] in (["name"], ["alias"]) and (people or bool(_PEOPLE & set(words)))
        if is_named or words[-1:] == ["by"] or (len(words) == 1 and words[0] in _ONE_PERSON):
            kind = "name"
        elif people and _TOWNS & set(words):
            kind = "address"
    if kind is None or kind not in _OF_TYPES.get(type_kind, {kind}):
        return None
    if words and words[-1] in _ABOUT and kind != "key":
        return None
    if words and words[-1] == "id" and kind in ("name", "email", "phone", "address") and len(words) > 1:
        return None  # points at a row, and its values are keys
    return kind


def _class_of(words: list[str]) -> str | None:
    # Of several words together first, `first_name`, `date_of_birth`; then each; then what is written in one.
    for length in range(min(4, len(words)), 0, -1):
        for start in range(len(words) - length + 1):
            found = _CLASS_OF_WORD.get("".join(words[start : start + length]))
            if found is not None:
                return found
    for word in words:
        for ending in _ENDINGS:
            if word.endswith(ending):
                return _CLASS_OF_WORD[ending]
    return None


def personal_by_values(values: Collection[str]) -> str | None:
    """The class of personal data that some different values of a column tell, or `None`.

    One value suffices where it can hardly be by chance: a secret, an e-mail address, an account number with right check
    digits. Names, telephone numbers, addresses and network addresses need a share.
    """
    texts = [text for text in (value.strip() for value in values) if text]
    if not texts:
        return None
    if any(looks_secret(text) for text in texts):
        return "key"
    if any(_INSIDE.search(text) for text in texts):
        return "email"
    if any(is_iban(text) for text in texts):
        return "bank"
    for kind, fits, least in _BY_SHARE:
        if sum(map(fits, texts)) >= max(1.0, least * len(texts)):
            return kind
    return None


def looks_secret(text: str) -> bool:
    """A key, a token or a hash: a known beginning, or a long word of small and large letters and digits mixed."""
    if _STRONG_KEYS.search(text):
        return True
    return any(_is_mixed(word) for word in _OPAQUE.findall(text))


def _is_mixed(word: str) -> bool:
    if "://" in word or word.count(".") > 2 or word.count("/") > 1:
        return False
    digits = sum(character.isdigit() for character in word)
    upper = sum(character.isupper() for character in word)
    lower = sum(character.islower() for character in word)
    pieces = len(_PIECE.findall(word))
    return (
        digits >= 2
        and upper >= 2
        and lower >= 2
        and len(set(word)) >= 10
        and digits + upper + lower < _PIECE_MEAN * pieces
    )


def _is_person(text: str) -> bool:
    """A given name, alone or with others, written as names are."""
    if len(text) > LABEL_LENGTH_MAX or _NAME_SHAPE.fullmatch(text) is None:
        return False
    words = re.findall("[a-z]+", plain_letters(text).lower())
    return not GIVEN_NAMES.isdisjoint(words) and (len(words) > 1 or not text.islower())


def _is_street(text: str) -> bool:
    return _STREET.fullmatch(text) is not None


_BY_SHARE: Final = (
    ("card", is_card_number, 0.3),
    ("ip", is_ip, 0.3),
    ("phone", is_phone, 0.3),
    ("address", _is_street, 0.2),
    ("name", _is_person, 0.2),
)


def may_show(value: str) -> bool:
    """Whether a value of a column that is not personal reads as a label, and not as something about somebody."""
    return (
        0 < len(value) <= LABEL_LENGTH_MAX
        and _LABEL.fullmatch(value) is not None
        and sum(character.isdigit() for character in value) <= 6
        and not (
            is_phone(value) or is_ip(value) or looks_secret(value) or _is_person(value) or _is_street(value)
        )
    )
