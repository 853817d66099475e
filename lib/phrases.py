"""The phrases by which a text betrays something: that its writer was given the labels, or that it refuses.

Regular expressions and nothing else; common.leaked and common.refused say what follows from them. Measured as
precision and recall by tests/test_reader.py.
"""

import re

# A chain leaks where it speaks of quintuples, labels or annotations as of something that it was given: they are given or
# listed, they say something, the image agrees with them. That a quintuple follows or is concluded is no leak.
TUPLES = r"(?:quintuples?|(?:5|five)-?tuples?|tuples?)"
NO_SOURCE = (
    r"(?! (?:\w+ )?(?:by|in|on|at|to|with|from|away)\b)"  # "given by the tweet", "listed on the poster"
)
DETERMINED = r"(?:(?<=the )|(?<=this )|(?<=that )|(?<=our )|(?<=your )|(?<=its )|(?<=with )|(?<=by )|(?<=to )|(?<=of ))"
LEAKS = [
    rf"(?:given|provided|supplied|annotated|stated|specified|listed|pre-?defined|known|labell?ed|gold(?:en)?|target|expected|reference"
    rf"|required|desired|intended|correct|above|aforementioned|original) (?:\w+ )?{TUPLES}",
    rf"{TUPLES},? (?:(?:that|which|as|I|we|you|is|are|was|were|has|have|had|been|already|explicitly) )*"
    r"(?:given|provided|supplied|listed|specified|annotated|stated|mentioned|above)",
    rf"{TUPLES} (?:to be \w+ed|(?:we|I) (?:need|must|should|have|want|are|were|was|am)|(?:in|of|on|from) the (?:list|input|prompt|data))",
    rf"{TUPLES} (?:[\[(][^\])\n]*[\])] )?(?:also |already |clearly |explicitly |further |correctly )?(?:states?|says?|indicates?|specif(?:y|ies)"
    r"|tells?|shows?|lists?|confirms?|requires?|mentions?|describes?|identif(?:y|ies)|asserts?|labels?|marks?|gives?|names?|suggests?"
    r"|implies|contains?|includes?|asks?|records?|captures?|reflects?|represents?)",
    rf"{TUPLES} (?:[\[(][^\])\n]*[\])] )?(?:is|are) (?:therefore |thus |also |\w+ly )?(?:correct|right|valid(?:ated)?|accurate|justified|supported"
    r"|confirmed|verified|consistent|satisfied|true|explained)",
    rf"(?:correctness|accuracy|validity|truth) of (?:the|this|these|our|each) (?:\w+ )?{TUPLES}",
    r"(?:given(?: that)?|per|according to|based on|match(?:es|ing)?|consistent with|in line with|in accordance with|align(?:s|ed|ing)? with"
    r"|correspond(?:s|ing)? (?:to|with)|agree(?:s|ing)? with|confirm(?:s|ing)?|support(?:s|ing)?|justif(?:y|ies|ying)|verif(?:y|ies|ying)"
    r"|validat(?:es?|ing)|reflect(?:s|ed in|ing)?|explain(?:s|ing)?|(?:know[ns]?|stated|listed|specified|given|provided|indicated|described"
    r"|mentioned|noted|defined|required|identified|marked|labell?ed) (?:from|in|by|as)) (?:the|this|these|those|that|our|each|all|your|both)"
    rf" (?:\w+ ){{0,2}}(?:{TUPLES}|annotations?|labels(?! (?:on|of|above|at|beside)\b))",
    rf"{DETERMINED}(?<!from the )(?<!among the )(?<!of the )(?:given|provided|supplied|annotated|gold(?:en)?|target|expected|reference|specified"
    r"|pre-?defined|labell?ed) (?:\w+ )?(?:labels?|answers?|output|relations?(?:hips?)?|types?)",
    rf"(?:relation|label)s?(?: labels?)? (?:provided|given|supplied|annotated)\b{NO_SOURCE}",
    rf"(?:relation(?:ship)?|type|label|entit(?:y|ies))s? (?:\w+ ){{0,3}}(?:is|are|was|were|has been|have been)(?: already| \w+ly)?"
    rf" (?:given|provided|specified|annotated|pre-?defined|supplied|known to be)\b{NO_SOURCE}",
    r"(?:the|our|these|those) labels (?:\w+ )?(?:indicate|say|state|specify|tell|give|suggest|confirm|require|name|mark|call|identify)",
    r"the label (?:tells|says|states|indicates|specifies|gives|marks)\b[^.\n]{0,60}\b(?:per|org|loc|misc)",
    rf"(?:we|I)(?:['’]re| are| were|['’]ve been| have been| am| was)(?: already)? (?:told|given|informed|provided with)\b{NO_SOURCE}",
    rf"it (?:is|was) (?:given|specified|annotated)\b{NO_SOURCE}",
    rf"as (?:given|provided|annotated|labell?ed|specified|required|instructed)\b{NO_SOURCE}",
    r"as (?:given|provided|annotated|labell?ed|specified|required) (?:in|by|with) the (?:\w+ )?(?:input|prompt|task|data|labels?|quintuples?)",
    r"(?:the|our) (?:prompt|instructions?|task|annotators?|input|dataset)(?: already)? (?:states?|says?|specif(?:y|ies)|gives?|provides?|lists?|asks?"
    r"|labels?|tells?|requires?|names?)",
    r"(?:stated|given|provided|listed|specified|supplied) (?:in|by|with) the (?:user|prompt|instructions?|task|input|dataset)",
    r"(?:the user|you) (?:states?|stated|specif(?:y|ies|ied)|gives?|gave|provides?d?|lists?|listed|supplied) (?:\w+ ){0,3}(?:relation|quintuple"
    r"|label|type|answer)s?",
    r"annotat(?:ions?|ors?)",
    r"ground[- ]truth",
    r"gold(?:en)?[- ](?:standard|annotations?|labels?|answers?)|gold data",
    r"(?:answer key|(?:expected|target|desired) (?:output|answer))",
]
LEAK = re.compile("|".join(rf"\b{pattern}\b" for pattern in LEAKS), re.I)

REFUSAL = re.compile(  # how a refusal begins: perhaps a regret or an excuse, then what it will not do
    r"\W*(?:(?:i['’]?m|i am)(?: \w+)? sorry|sorry|(?:my )?apologies|i (?:sincerely )?apologi[sz]e|unfortunately|regrettably|i regret[^.\n]{0,40}"
    r"|as an? [^.,\n]{0,60}(?:ai|model|assistant)\b[^.,\n]{0,40}|i (?:understand|appreciate)[^.\n]{0,80}|thank you[^.\n]{0,80}"
    r"|(?:due to|for|because of) [^.,\n]{0,60}(?:privacy|safety|policy|policies|guidelines|reasons)[^.,\n]{0,30})?"
    r"(?:\W|\b(?:but|however|and|that|while)\b)*"
    r"(?:i(?:['’]?m| am| have to| need to| must| will| would)?(?: \w+ly| really)? ?(?:can(?:['’]?t|not)|can not|won['’]?t|will not|not able"
    r"|unable|not comfortable|not (?:permitted|allowed)|could(?:n['’]t| not)|decline|refuse|have to decline"
    r"|do(?:n['’]t| not) (?:identify|recogni[sz]e|assist|help|provide|feel|have the ability|engage|comment))\b"
    r"|(?:my|our|openai['’]s) (?:\w+ )?(?:guidelines?|polic(?:y|ies)|programming|rules)\b|it(?:['’]s| is) against (?:my|our|the)\b"
    r"|[^.\n]{0,60}\bnot something i can\b|th(?:is|e) (?:request|content)[^.\n]{0,40}(?:violates|not allowed|against))"
    r"|\W*(?:非常|很)?(?:抱歉|对不起)|\W*我(?:无法|不能|不可以)|\W*(?:lo siento|je suis désolée?|es tut mir leid|mi dispiace|desculpe)\b",
    re.I,
)
REGRET = re.compile(r"\W*(?:i['’]?m\b|i am\b|sorry|(?:my )?apolog|unfortunately|regret)", re.I)
