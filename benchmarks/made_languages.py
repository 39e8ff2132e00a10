# ruff: noqa: RUF001 (letters of other scripts are meant)
"""Short texts in four languages that have no English stemmer: what was told, what is asked, and what else was said.

Questions have other forms of the words than the answers: Russian cases and tenses, Hebrew prefixes, and in Chinese
and Japanese words between which nothing is written.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from benchmarks.made_conversations import BEGAN, SEED, Collection, Probe, Said


@dataclass(frozen=True, kw_only=True)
class Language:
    """What is told and asked in one language, and the parts of which other sentences are made."""

    name: str
    told: Sequence[tuple[str, str]]
    """(what is told, what is asked)."""
    frames: Sequence[str]
    people: Sequence[str]
    verbs: Sequence[str]
    things: Sequence[str]
    places: Sequence[str]


RUSSIAN = Language(
    name="Russian",
    told=(
        ("Мою собаку зовут Дружок.", "Как зовут собак, которых я держу?"),
        ("Я переехал в Казань прошлой весной.", "В какой город я переезжал?"),
        ("У сестры аллергия на орехи.", "Какие орехи или другую еду не ест сестра?"),
        ("Ключи от дачи лежат в синей шкатулке.", "Где ключ от дачи?"),
        ("Врач запретил мне кофе.", "Что запрещено врачами?"),
        ("Паспорт нужно заменить в ноябре.", "Когда замена паспорта?"),
        ("Бабушка родилась в деревне под Вологдой.", "Где родилась моя бабушка?"),
        ("По средам я хожу на плавание.", "В какой день у меня плаванье?"),
        ("Мой начальник — Аркадий Петрович.", "Кто у нас начальником?"),
        ("Машина стоит в гараже на улице Гоголя.", "На какой улице гараж с машиной?"),
        ("Договор подписали седьмого июня.", "Когда был подписан договор?"),
        ("Дочь учится играть на скрипке.", "На чём играет дочка, на скрипках?"),
    ),
    frames=(
        "{p} {v} {t} {w}.", "Вчера {p} {v} {t} {w}.", "Говорят, что {p} {v} {t}.",
        "{w} {p} снова {v} {t}, и всем понравилось.",
    ),
    people=("Иван", "Марина", "Олег", "Светлана", "Павел", "наш сосед", "моя коллега", "тётя Люба", "студент"),
    verbs=("купил", "забыл", "нашёл", "починил", "потерял", "показал", "продал", "нарисовал", "взял"),
    things=(
        "старую лампу", "зелёный чайник", "новую книгу", "велосипед", "тёплое одеяло", "деревянный стул", "зонт",
        "часы", "карту города", "фотографию", "тетрадь", "радио",
    ),
    places=("на рынке", "в библиотеке", "у озера", "перед обедом", "в поезде", "после работы", "на балконе", "утром"),
)  # fmt: skip
HEBREW = Language(
    name="Hebrew",
    told=(
        ("הכלב שלי נקרא שוקו.", "מה השם של כלב שלי?"),
        ("עברתי לחיפה באביב.", "מתי גרתי בחיפה לראשונה?"),
        ("לאחותי יש אלרגיה לאגוזים.", "אילו אגוזים אסורים?"),
        ("המפתח של המחסן נמצא במגירה הכחולה.", "איפה מפתח למחסן?"),
        ("הרופא אסר עליי לשתות קפה.", "מה אמר רופא על הקפה?"),
        ("צריך לחדש את הדרכון בנובמבר.", "מתי מחדשים דרכון?"),
        ("סבתא נולדה בכפר ליד ורשה.", "ליד איזו עיר נולדה סבתא, ורשה?"),
        ("בימי רביעי אני הולך לשחייה.", "באיזה יום יש שחייה?"),
        ("המנהל החדש שלי הוא גדעון.", "מי מנהל אותי?"),
        ("האופניים עומדים במרתף של רחוב ביאליק.", "באיזה רחוב אופניים במרתף?"),
        ("החוזה נחתם בשבעה ביוני.", "מתי נחתם חוזה?"),
        ("הבת שלי לומדת לנגן בכינור.", "באיזה כלי, כינור או חליל, מנגנת הבת?"),
    ),
    frames=("{p} {v} {t} {w}.", "אתמול {p} {v} {t} {w}.", "אומרים ש{p} {v} {t}.", "{w} {p} שוב {v} {t} וכולם נהנו."),
    people=("יוסי", "מרים", "דניאל", "נועה", "אבי", "השכן", "המורה", "דודה רחל", "הסטודנט"),
    verbs=("קנה", "שכח", "מצא", "תיקן", "איבד", "הראה", "מכר", "צייר", "לקח"),
    things=(
        "מנורה ישנה", "קומקום ירוק", "ספר חדש", "שמיכה חמה", "כיסא מעץ", "מטרייה", "שעון", "מפה", "תמונה", "מחברת",
        "רדיו", "מצלמה",
    ),
    places=("בשוק", "בספרייה", "ליד האגם", "לפני הצהריים", "ברכבת", "אחרי העבודה", "במרפסת", "בבוקר"),
)  # fmt: skip
CHINESE = Language(
    name="Chinese",
    told=(
        ("我的狗叫豆豆。", "狗叫什么名字？"),
        ("去年春天我搬到了成都。", "我搬到哪个城市了？"),
        ("妹妹对花生过敏。", "谁不能吃花生？"),
        ("备用钥匙在蓝色的盒子里。", "钥匙放在哪里？"),
        ("医生不让我喝咖啡。", "医生说什么饮料不能喝？"),
        ("护照十一月到期。", "什么时候要换护照？"),
        ("奶奶出生在苏州的一个小镇。", "奶奶是哪里人？"),
        ("每个星期三我去游泳。", "我哪天游泳？"),
        ("新来的经理姓欧阳。", "经理姓什么？"),
        ("汽车停在北京路的车库。", "车库在哪条路？"),
        ("合同是六月七日签的。", "合同哪天签字？"),
        ("女儿在学小提琴。", "女儿学什么乐器？"),
    ),
    frames=("{p}{w}{v}{t}。", "昨天{p}{w}{v}{t}。", "听说{p}{v}{t}。", "{p}又{w}{v}{t},大家都很高兴。"),
    people=("小王", "李老师", "张明", "邻居", "同事", "阿姨", "表哥", "学生", "陈先生"),
    verbs=("买了", "忘了", "找到了", "修好了", "丢了", "卖掉了", "画了", "借走了", "看见了"),
    things=(
        "一盏旧灯", "绿色的水壶", "一本新书", "自行车", "一条毯子", "木头椅子", "雨伞", "手表", "地图", "照片",
        "笔记本", "收音机",
    ),
    places=("在市场", "在图书馆", "在湖边", "午饭前", "在火车上", "下班以后", "在阳台上", "早上"),
)  # fmt: skip
JAPANESE = Language(
    name="Japanese",
    told=(
        ("うちの犬の名前はモモです。", "犬の名前は何ですか？"),
        ("去年の春に仙台へ引っ越しました。", "どこへ引っ越した？"),
        ("妹はピーナッツのアレルギーがあります。", "ピーナッツが食べられないのは誰？"),
        ("予備の鍵は青い箱の中にあります。", "鍵はどこにある？"),
        ("医者にコーヒーを止められました。", "医者は何を飲むなと言った？"),
        ("パスポートは十一月に切れます。", "パスポートの更新はいつ？"),
        ("祖母は長崎の小さな村で生まれました。", "祖母の生まれた所は？"),
        ("毎週水曜日に水泳に行きます。", "水泳は何曜日？"),
        ("新しい部長は西園寺さんです。", "部長は誰ですか？"),
        ("車は中央通りの車庫に置いてあります。", "車庫はどの通り？"),
        ("契約書には六月七日に署名した。", "契約書の署名はいつでしたか？"),
        ("娘はバイオリンを習っています。", "娘が習っている楽器は？"),
    ),
    frames=("{p}が{w}{t}を{v}。", "昨日{p}が{w}{t}を{v}。", "{p}は{t}を{v}そうです。",
            "また{p}が{w}{t}を{v}、楽しかった。"),
    people=("田中さん", "先生", "隣の人", "同僚", "おばさん", "いとこ", "学生", "鈴木さん", "友達"),
    verbs=("買った", "忘れた", "見つけた", "直した", "なくした", "売った", "描いた", "借りた", "見た"),
    things=(
        "古いランプ", "緑のやかん", "新しい本", "自転車", "毛布", "木の椅子", "傘", "時計", "地図", "写真", "ノート",
        "ラジオ",
    ),
    places=("市場で", "図書館で", "湖のそばで", "昼食の前に", "電車で", "仕事の後に", "ベランダで", "朝"),
)  # fmt: skip
LANGUAGES = (RUSSIAN, HEBREW, CHINESE, JAPANESE)


def short_texts(language: Language, count: int) -> Collection:
    """So many memories in a language, among them what is asked for."""
    chance = random.Random(f"{SEED} {language.name}")
    made: dict[str, None] = {}
    while len(made) < count:
        frame = chance.choice(language.frames)
        parts = (language.people, language.verbs, language.things, language.places)
        made[frame.format(**dict(zip("pvtw", map(chance.choice, parts), strict=True)))] = None
    texts = list(made)
    places = chance.sample(range(count), len(language.told))
    for place, (statement, _) in zip(places, language.told, strict=True):
        texts[place] = statement
    return Collection(
        name=f"{language.name}, short memories",
        is_english=False,
        texts=[Said(text=text, at=BEGAN + timedelta(hours=number)) for number, text in enumerate(texts)],
        probes=[
            Probe(question=question, answer=place)
            for place, (_, question) in zip(places, language.told, strict=True)
        ],
    )
