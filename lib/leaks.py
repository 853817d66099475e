"""By which words a chain of thought betrays that its writer was given the labels.

A chain leaks where it speaks of quintuples, labels or annotations as of something that it was given: they
are given or listed, they say something, the image agrees with them. That a quintuple follows or is concluded
is no leak. Knows no prompt; common.leaked says what follows. Measured by tests/test_reader.py.
"""

import re

TUPLES = r"(?:quintuples?|(?:5|five)-?tuples?|tuples?)"
ITEM = r"(?:[\[(][^\])\n]{0,200}[\])] )?"  # the quintuple itself may stand between
GIVEN = r"given|provided|supplied|annotated|specified|pre-?defined|labell?ed"
GOLD = r"gold(?:en)?|target|expected|reference"
# "given by the tweet", "listed on the poster" names another source.
NO_SOURCE = r"(?! (?:\w+ )?(?:by|in|on|at|to|with|from|away)\b)"
THE = (
    r"(?:(?<=the )|(?<=this )|(?<=that )|(?<=our )|(?<=your )|(?<=its )|(?<=with )|(?<=by )|(?<=to )"
    r"|(?<=of ))"
)
NO_CHOICE = (
    r"(?<!from the )(?<!among the )(?<!of the )"  # "among the given relations" chooses from the label set
)
TELLS = (
    r"(?:states?|says?|indicates?|specif(?:y|ies)|tells?|shows?|lists?|confirms?|requires?|mentions?"
    r"|describes?|identif(?:y|ies)|asserts?|labels?|marks?|gives?|names?|suggests?|implies|contains?"
    r"|includes?|asks?|records?|captures?|reflects?|represents?)"
)
HOLDS = (
    r"(?:correct|right|valid(?:ated)?|accurate|justified|supported|confirmed|verified|consistent|satisfied"
    r"|true|explained)"
)
AGREES = (
    r"(?:given(?: that)?|per|according to|based on|match(?:es|ing)?|(?:consistent|in line|in accordance) with"
    r"|align(?:s|ed|ing)? with|correspond(?:s|ing)? (?:to|with)|agree(?:s|ing)? with|confirm(?:s|ing)?"
    r"|support(?:s|ing)?|(?:justif|verif)(?:y|ies|ying)|validat(?:es?|ing)|reflect(?:s|ed in|ing)?"
    r"|explain(?:s|ing)?|(?:know[ns]?|stated|listed|specified|given|provided|indicated|described|mentioned"
    r"|noted|defined|required|identified|marked|labell?ed) (?:from|in|by|as))"
)
LEAKS = [
    # the given quintuple, the quintuples (that are) listed, the quintuple to be derived
    rf"(?:{GIVEN}|{GOLD}|stated|listed|known|required|desired|intended|correct|above|aforementioned|original)"
    rf" (?:\w+ )?{TUPLES}",
    rf"{TUPLES},? (?:(?:that|which|as|I|we|you|is|are|was|were|has|have|had|been|already|explicitly) )*"
    r"(?:given|provided|supplied|listed|specified|annotated|stated|mentioned|above)",
    rf"{TUPLES} (?:to be \w+ed|(?:we|I) (?:need|must|should|have|want|are|were|was|am)"
    r"|(?:in|of|on|from) the (?:list|input|prompt|data))",
    # the quintuple [A, …] states, is correct; the picture agrees with it
    rf"{TUPLES} {ITEM}(?:also |already |clearly |explicitly |further |correctly )?{TELLS}",
    rf"{TUPLES} {ITEM}(?:is|are) (?:therefore |thus |also |\w+ly )?{HOLDS}",
    rf"(?:correctness|accuracy|validity|truth) of (?:the|this|these|our|each) (?:\w+ )?{TUPLES}",
    rf"{AGREES} (?:the|this|these|those|that|our|each|all|your|both) (?:\w+ ){{0,2}}"
    rf"(?:{TUPLES}|annotations?|labels(?! (?:on|of|above|at|beside)\b))",
    # the provided relation, the relation is specified, the labels indicate
    rf"{THE}{NO_CHOICE}(?:{GIVEN}|{GOLD}) (?:\w+ )?"
    r"(?:labels?|answers?|output|relations?(?:hips?)?|types?)",
    rf"(?:relation|label)s?(?: labels?)? (?:provided|given|supplied|annotated)\b{NO_SOURCE}",
    rf"(?:relation(?:ship)?|type|label|entit(?:y|ies))s? (?:\w+ ){{0,3}}(?:is|are|was|were|ha(?:s|ve) been)"
    r"(?: already| \w+ly)? (?:given|provided|specified|annotated|pre-?defined|supplied|known to be)\b"
    rf"{NO_SOURCE}",
    r"(?:the|our|these|those) labels (?:\w+ )?"
    r"(?:indicate|say|state|specify|tell|give|suggest|confirm|require|name|mark|call|identify)",
    r"the label (?:tells|says|states|indicates|specifies|gives|marks)\b[^.\n]{0,60}\b(?:per|org|loc|misc)",
    # we are told, as annotated, the prompt says, the user states the relation
    r"(?:we|I)(?:['’]re| are| were|['’]ve been| have been| am| was)(?: already)?"
    rf" (?:told|given|informed|provided with)\b{NO_SOURCE}",
    rf"it (?:is|was) (?:given|specified|annotated)\b{NO_SOURCE}",
    rf"as (?:given|provided|annotated|labell?ed|specified|required|instructed)\b{NO_SOURCE}",
    r"as (?:given|provided|annotated|labell?ed|specified|required) (?:in|by|with) the (?:\w+ )?"
    r"(?:input|prompt|task|data|labels?|quintuples?)",
    r"(?:the|our) (?:prompt|instructions?|task|annotators?|input|dataset)(?: already)? (?:states?|says?"
    r"|specif(?:y|ies)|gives?|provides?|lists?|asks?|labels?|tells?|requires?|names?)",
    r"(?:stated|given|provided|listed|specified|supplied) (?:in|by|with) the"
    r" (?:user|prompt|instructions?|task|input|dataset)",
    r"(?:the user|you) (?:states?|stated|specif(?:y|ies|ied)|gives?|gave|provides?d?|lists?|listed|supplied)"
    r" (?:\w+ ){0,3}(?:relation|quintuple|label|type|answer)s?",
    # the words of those who annotate
    r"annotat(?:ions?|ors?)",
    r"ground[- ]truth",
    r"gold(?:en)?[- ](?:standard|annotations?|labels?|answers?)|gold data",
    r"(?:answer key|(?:expected|target|desired) (?:output|answer))",
]
LEAK = re.compile("|".join(rf"\b(?:{pattern})\b" for pattern in LEAKS), re.I)
