"""`generated-dictation`: sentences to pretrain a recogniser on, of other words and voices than the rest."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from atoll.datasets.synthetic.drawing import cut
from atoll.datasets.synthetic.speech import Voice, recordings
from atoll.protocol.random_streams import stream_seed

_WORDS = """
about above across after ago all along also always animal answer any apple around ask away baby back bad bag
ball bank bath beach bear beautiful because become before begin behind believe better between bird boat body
bone book bottle box boy bread break bridge bring brother build burn bus busy butter buy captain carry cat
catch chair change cheap cheese chicken child choose city class clean clear climb clock close clothes cloud
coat coffee come cook corn country cross crowd cry cup cut dance danger daughter day deep desk different
dinner dirty dog door dream dress drink drop dust ear early earth east easy eat edge egg empty engine enough
evening every eye face fall family far farm fast father few field fight finger finish fire fish floor flower
fly follow food foot forest forget forward free fresh friend fruit full game garden gate gentle girl give
glad glass go gold good grass great ground group grow guess gun hair hand hang happy hard hat have head
healthy heart heavy help high hill history hold hole holiday home hope horse hospital hot house human
hundred hunt husband ice idea island jacket job join journey juice jump just keep key kill kind king kiss
knee knife know lady lake land language large last laugh law lazy lead learn leave leg lemon less letter
level library lie life lion listen little live lock long look lose love low lucky lunch machine man many map
market marry match matter meal mean meat meet middle milk mind mirror miss money monkey month moon mountain
mouth move much narrow nature near neck need neighbour never night noise north nose nothing number ocean
offer often only open other paint paper parent park part party pay peace pen pencil people pepper picture
piece plane plant plastic plate pocket point police poor possible potato prepare pretty price prince print
problem promise pull push put queen question quiet reach read ready real remember repeat rest rice rich ride
right river road roof round rule sad safe sail salt same sand save say school science sea seat see sell send
shape share sharp sheep ship shirt shoe shop short should shoulder shout shut sick side sign silver simple
sister sit sky sleep slow small smell smile smoke snow soft soldier some son song soon sound soup south
space speak special spell spoon sport spring square stand star start stay step stick stone stop store storm
story straight strange street strong student study sugar summer sun sweet swim table talk tall taste teach
tell thank thick thin think thousand throw ticket tiger tired together tomorrow tool tooth top touch train
travel tree trip trouble true trust try under understand use valley very village visit voice wait walk wall
war warm wash waste watch water wave weak wear wedding week welcome west wet wheel while why wide wife win
wind window wine wing winter wise wish woman wonder wood word work world worry write wrong year yesterday
young zoo
"""
WORDS = tuple(_WORDS.split())
VOICES = (
    Voice("en-us+f1", 170, 55), Voice("en-us+m6", 165, 45), Voice("en-us+m4", 175, 40),
    Voice("en-us+f3", 180, 62), Voice("en-us-nyc", 170, 48), Voice("en-gb-x-gbclan", 165, 50),
    Voice("en-gb-x-gbcwmd+f1", 175, 58), Voice("en-029+m2", 170, 42), Voice("en-us+m5", 185, 52),
    Voice("en-gb-scotland+m8", 165, 45),
)  # fmt: skip
_FEWEST, _MOST = 2, 5


def generated_dictation(seed: int = 0, count: int = 2400) -> dict[str, pa.Table]:
    """Words in no order: columns audio (16 kHz mono 16-bit WAV), transcript, speaker.

    Raises:
        DataError: espeak-ng isn't installed, or fails.
    """
    rng = np.random.default_rng(stream_seed(seed, "generated-dictation"))
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[" ".join(rng.choice(WORDS, rng.integers(_FEWEST, _MOST + 1)))] = None
    speakers = [int(speaker) for speaker in rng.integers(0, len(VOICES), count)]
    return cut(recordings(list(texts), speakers, VOICES), test=0.05)
