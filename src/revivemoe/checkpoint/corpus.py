"""Text to train a tokenizer on: a little prose, then words composed from stems and endings."""

from collections.abc import Iterator

PROSE = """\
A mixture of experts model keeps many feed forward networks in every layer and sends each token to
only a few of them. The router scores the experts, the scores become weights, and the outputs of
the chosen experts are added up. Because the experts lie on many devices, the tokens travel: they
are dispatched to the ranks that hold the experts, computed there, and combined where they came
from. When one of these devices fails, everything else still works, but the collective operations
wait for a partner that will never answer. The usual remedy is to start the whole instance again,
load the weights again, compile the graphs again, and to lose every request that was under way.
It is better to keep what is healthy. The survivors leave the broken group, undo the step that was
interrupted, agree on a new membership and go on. The requests of the lost rank move to other
ranks together with the tokens they have produced so far, and their owners notice a short pause
at most. An expert with a second copy needs no work at all. An expert without one is loaded into a
spare slot, or another rank changes its role, or, if only a few are missing, the router is told
not to choose them until they are back.
What is the capital of France? Paris is the capital of France. How many people live there?
Write a short story about a lighthouse keeper who finds a letter in a bottle. Once upon a time,
there was a small town by the sea. Every morning the baker opened her shop before sunrise and the
children came running down the hill with their dogs. She said, "I have never seen so much snow!"
The quick brown fox jumps over the lazy dog. Explain how a computer stores numbers: 0, 1, 2, 3,
10, 42, 100, 255, 256, 1000, 1024, 2048, 3.14159 and -17. Please give me five examples of it.
def add(a, b):
    return a + b
for i in range(10):
    print(f"{i}: {values[i]}")
if __name__ == "__main__":
    main()
{"name": "example", "version": "1.0", "items": [1, 2, 3], "ready": true, "error": null}
You are a helpful assistant. Thank you for your question. Yes, that is right. No, it isn't; let's
look at it step by step. First, we should think about what we know. Second, we don't know when
they'll arrive. Finally, here's the answer. I'm sorry, but I can't do that. We've already done it.
"""

STEMS = """\
act add aim art ask back base bear beat bell bend bill bind bird blank blend block board boat body
bold bond book born bound box brain branch brand bread break bridge brief bright broad build burn
call calm camp card care carry case cast catch cause cell chain chair chance change charge chart
check child claim class clean clear climb close cloud coach coast code cold color come cook cool
copy corn cost count course court cover craft create cross crowd cure cycle dance dark date deal
dear deep depend desk detail direct doubt draft draw dream dress drift drink drive drop dust earn
earth east edge end enter equal escape event exact expect express eye face fact fail fair faith
fall farm fast father fear feed feel field fight figure file fill film find fine finger fire firm
fish flat flight float floor flow flower fold follow food foot force forest form frame free fresh
friend front fruit full gain game garden gate gather gentle give glass globe gold good grain grand
grant grass great green ground group grow guard guess guide habit hair half hall hand happen hard
head hear heart heat heavy help hide high hill hold home honest hope horse host hour house human
hunt ice inform island join joint judge jump just keep kind king kitchen knee know lake land large
last late laugh law lead learn leave left lend length letter level lift light limit line list
listen live local lock long look loud love lower main make manage map mark market master match
matter mean measure meet member memory mend middle mile mind minute miss model modern moment month
moral morning mother motion motor mount mouth move music name narrow nation nature neck neighbor
nerve night noise north note number object observe ocean offer office open order organ other owner
pack page pain paint pair paper parent park part pass past path pattern pause peace perfect person
phrase picture piece place plain plan plane plant plate play please pocket point police poor port
post pound power practice present press price print prize problem process produce product profit
proof proper protect proud public pull pure push quality quarter queen quick quiet race rail rain
raise range rapid rate reach read ready reason record reduce region relate remain report request
rest result return rich ride right ring rise river road rock role roll roof room root round route
row rule run safe sail salt sand save scale scene school science score sea search season seat
second secret seed seem select self sell send sense separate series serve settle shade shake shape
share sharp sheet shelf shell shift shine ship shoot shop shore short shout show side sign signal
silent silver simple single sister size skill skin sky sleep slide slow small smart smell smile
smoke smooth snow soft soil solid solve song sort sound source south space speak special speed
spell spend spirit sport spot spread spring square stage stand star start state station stay steam
steel step stick still stock stone stop store storm story strange stream street stretch strong
student study style subject success sudden sugar suit summer supply support surface swim switch
system table talk task taste teach team term test thank theory thick thin thing think thought
thread throw time tired title tool top total touch tower town track trade train travel tree trial
trip trouble trust truth turn type uncle under union unit value vary vein verb verse view village
visit voice vote wait walk wall warm wash watch water wave weak wealth wear weather week weight
west wheel white whole wide wife wild wind window wine wing winter wish woman wonder wood word
work world worry worth wrong yard year yellow young zero
"""

ENDINGS = "s ed ing er ers ly ness less ful able ment ion ist ism ship ward let like some"
STARTS = "re un over out in dis pre sub"
PROSE_REPEATS = 400
"""The prose outweighs the composed words, so that its common words become tokens first."""


def corpus() -> Iterator[str]:
    """The same text in the same order every time."""
    for _ in range(PROSE_REPEATS):
        yield PROSE
    endings = ["", *ENDINGS.split()]
    for start in ["", *STARTS.split()]:
        for stem in STEMS.split():
            yield " ".join(" " + start + stem + ending for ending in endings)
