"""Common given names, to recognise columns that hold names of people: plain Latin letters, several languages.

Words that are also everyday labels (`mark`, `grace`, `will`, `may`, `april`, `june`, `sterling`, …) are left out.
"""

from __future__ import annotations

from typing import Final

from agent.discovery.words import word_set

GIVEN_NAMES: Final = word_set("""
    aaron abdul abdullah abigail adam adele adrian adriana agnes agnieszka ahmed aisha alan albert alberto
    alejandra alejandro aleksandra alessandra alessandro alexander alexandra alexis alfred ali alice alicia
    alina alison amanda amelia amina amir amit amy ana anastasia andre andrea andreas andrei andrew andrzej
    angela angelina anita anjali ann anna anne annette annika anthony anton antonia antonio arjun arnold arthur
    asha astrid audrey ayse barbara beatrice beatriz benjamin bernard bernd bettina betty birgit brandon brenda
    brian bruno camila carl carla carlos carmen carol carolina caroline catherine cecilia charles charlotte chen
    chiara christian christina christine christoph christopher claire claudia clara cristina cynthia daniel
    daniela danielle david deborah denis denise dennis derek diana diego dieter dmitri dominik donald donna
    doris dorothy douglas edith eduardo edward elena eleni elias elif elisabeth elizabeth ella ellen elsa emil
    emilia emily emma emmanuel enrique eric erik erika esther eva evelyn fatima fatma felix fernanda fernando
    florian frances francesca francesco francis francisco francois frank franz fred frederic frederik friedrich
    gabriel gabriela gary george georg gerald gerard gerhard giorgio giovanni giulia giuseppe gloria grzegorz
    guillaume gunther gustav hannah hanna hans harald harold harry hassan hector heidi heike heinz helen helena
    helga henri henrik henry hermann hiroshi horst hugo hussein ian ibrahim ida ines ingrid irene irina isabel
    isabella isabelle ivan jacob jacqueline jacques jaime jakob james jan jana jane janet jasmin jason javier
    jean jeffrey jennifer jeremy jerzy jesse jessica jesus jim joan joanna joao joaquin joe johan johann johanna
    john johannes jonas jonathan jorge jose josef joseph joshua juan juana judith judy julia julian juliana
    julie jurgen justin justyna kamil karen karin karl karolina katarzyna kate katharina katherine kathleen
    katja katrin kazimierz keith kelly kenji kenneth kevin khalid kimberly klaus konstantin krzysztof kumar kurt
    lakshmi larry lars laura lauren laurent lea leah leila lena leon leonardo leonie leticia lewis liam lidia
    linda lisa lothar louis louise luca lucas lucia luciana lucy luigi luis luisa lukas magda magdalena maja
    malgorzata manfred manuel manuela marc marcel marcela marcin marco marcos marek margaret margarita maria
    mariam mariana marie marina mario marion marta martha martin martina mary maryam mateusz matteo matthew
    matthias maurice max maximilian megan mehmet melanie melissa mercedes michael michal michel michele michelle
    miguel mikhail miriam mohamed mohammed monica monika muhammad mustafa nadia nancy natalia natalie natasha
    nathan nicholas nico nicola nicolas nicole niels nikolai nils nina noah nora norbert olaf oleg olga oliver
    olivia omar oscar oskar pamela paola paolo patricia patrick paul paula paulo pavel pedro peter petra philip
    philipp philippe pierre pilar piotr priya rachel rafael rahul rainer raj raja ralf ramon raquel raul rebecca
    renate rene ricardo richard rita robert roberta roberto rodrigo roger roland rolf roman ronald rosa rosemary
    ruben rudolf ruth ryan sabine sabrina salma samantha samir samuel sandra sanjay santiago sara sarah scott
    sean sebastian sergei sergio sharon shirley silvia simon simone sofia sonia sophia sophie stanislaw stefan
    stefanie stefano stella stephanie stephen steven sunita susan susanne suzanne sven sylvia takashi tamara
    tanja tatiana teresa theodor theresa thomas thorsten tim timothy tobias tomas tomasz torsten ulrich ulrike
    ursula uwe valentina valeria valerie vanessa vera veronica veronika victoria vikram viktor vincent vincenzo
    virginia vladimir walter wanda wei werner wilhelm william wojciech wolfgang xavier yan yasmin yolanda yosef
    youssef yuki yusuf yves yvonne zainab zhang zofia
    """)
