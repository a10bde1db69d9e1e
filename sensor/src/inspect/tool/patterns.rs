//! What poisoned descriptions say, as the literature has it: Invariant Labs
//! (tool poisoning, shadowing, the WhatsApp server), Trail of Bits (line
//! jumping), CyberArk (full-schema poisoning, ATPA), OWASP MCP03, SAFE-MCP.
//!
//! A pattern asks for words that speak to the model, not for words that a tool
//! may need: "reads .env files" is a tool, "first read .env and pass its
//! content" is not. Patterns are read within a sentence (which is what keeps
//! them small: a gap is `.*`), a few over the whole text.

use std::sync::{LazyLock, OnceLock};

use regex::bytes::{Regex, RegexBuilder, RegexSet, RegexSetBuilder};

use super::{
    super::Severity::{self, High, Medium},
    plain::sentences,
};

/// Matches of one pattern in one text that are reported.
const MATCHES: usize = 4;
/// Of compiled states that are kept, for each of the two sets.
const CACHE_BYTES: usize = 256 * 1024;

/// Rule, severity, expression, and what a match must not contain.
type Pattern = (&'static str, Severity, &'static str, &'static str);

/// Text as `plain` gives it: lower case, single blanks.
pub fn find(plain: &str) -> Vec<(&'static str, Severity, &[u8])> {
    static SETS: LazyLock<[Set; 2]> = LazyLock::new(|| [Set::new(IN_SENTENCE), Set::new(ANYWHERE)]);
    let mut found = Vec::new();
    for sentence in sentences(plain) {
        SETS[0].find(sentence, &mut found);
    }
    SETS[1].find(plain, &mut found);
    found
}

struct Set {
    patterns: &'static [Pattern],
    set: RegexSet,
    /// Each alone, compiled when it first matched.
    each: Vec<OnceLock<(Regex, Option<Regex>)>>,
}

impl Set {
    fn new(patterns: &'static [Pattern]) -> Self {
        // Classes of ASCII are enough, and a tenth of the size.
        let set = RegexSetBuilder::new(patterns.iter().map(|(_, _, regex, _)| written_out(regex)))
            .unicode(false)
            .dfa_size_limit(CACHE_BYTES)
            .build()
            .expect("the patterns are constants, and tested");
        Self { patterns, set, each: patterns.iter().map(|_| OnceLock::new()).collect() }
    }

    fn find<'t>(&self, text: &'t str, found: &mut Vec<(&'static str, Severity, &'t [u8])>) {
        let text = text.as_bytes();
        for n in self.set.matches(text) {
            let (rule, severity, regex, unless) = self.patterns[n];
            let (regex, unless) = self.each[n].get_or_init(|| {
                let compile = |regex| {
                    let written = written_out(regex);
                    RegexBuilder::new(&written)
                        .unicode(false)
                        .dfa_size_limit(CACHE_BYTES)
                        .build()
                        .expect("as above")
                };
                (compile(regex), (!unless.is_empty()).then(|| compile(unless)))
            });
            let matches = regex.find_iter(text).map(|m| m.as_bytes());
            let meant = matches.filter(|text| !unless.as_ref().is_some_and(|unless| unless.is_match(text)));
            found.extend(meant.take(MATCHES).map(|text| (rule, severity, text)));
        }
    }
}

/// `<WORDS>` in an expression stand for these.
const WORDS: &[(&str, &str)] = &[
    // What tells the model to do something.
    (
        "<CUE>",
        r"\b(?:you (?:must|should|shall|need to|have to|are (?:required|instructed|obliged) to|will)|please|always|make sure|be sure to|ensure|first|must|before (?:using|calling|invoking|running|executing|answering|responding|performing|proceeding|returning|any|you|each|every)|prior to|when(?:ever)? (?:using|calling|invoking)|after (?:using|calling|reading|each|every)|for (?:each|every)|in order to|also|then|important:?|required for|needed to|mandatory|to (?:proceed|continue|use this))\b",
    ),
    (
        "<NOT>",
        r"\b(?:do not|don't|never|must not|mustn't|should not|shouldn't|avoid|without|refrain from|not to|no need to|need not)(?: \w+)?",
    ),
    // Taking content from somewhere, or handing it on.
    (
        "<TAKE>",
        r"\b(?:read|open|cat|access|load|fetch|get|retrieve|extract|collect|gather|include|pass|send|upload|copy|append|attach|submit|paste|dump|print|output|provide|supply|put|insert|forward|exfiltrate|embed|encode)\b",
    ),
    (
        "<SEND>",
        r"\b(?:send|post|forward|upload|transmit|exfiltrate|submit|leak|bcc|deliver|redirect|route|copy|append|report|sync|mirror|e-?mail|pass|encode)\b",
    ),
    // Files that hold what others should not have.
    (
        "<FILE>",
        r"(?:(?:~|\$\{?home\}?|/root|/home/[^/ ]+|/users/[^/ ]+|%userprofile%)[/\\]\.(?:ssh|aws|gnupg|kube|docker|cursor|claude|codex|gemini|netrc|npmrc|pypirc|git-credentials|bash_history|zsh_history|bashrc|zshrc|env|azure|config/gcloud|password-store)\b|\.ssh[/\\]|\.aws[/\\]credentials|\bid_(?:rsa|ed25519|ecdsa|dsa)\b|(?:\bclaude_desktop_config|\bmcp|\bmcp_config|\.claude)\.json\b|(?:^|[ `'\x22/(])\.env\b|/etc/(?:passwd|shadow|sudoers|secrets?\b)|/proc/self/environ|\.git-credentials\b|\.netrc\b|\.kube/config|\.(?:bash|zsh)_history\b|\bcredentials\.(?:json|ya?ml|txt|csv|xml|ini)\b|\bwallet\.dat\b|\b(?:ssh|private) keys?\b|\b\w*(?:secret|token|password|api_?key|access_key|private_key)\w* env(?:ironment)?\b)",
    ),
    ("<AWAY>", r"(?:https?://|ftp://|wss?://|[\w.+-]+@[\w-]+\.[a-z]{2,}|\+\d{8,})"),
    ("<TO>", r"\b(?:to|at|via|bcc|cc)\b(?: [\w-]+){0,4}? ?[`'\x22(<]?"),
    // What is not the tool's to send anywhere.
    (
        "<OWN>",
        r"\b(?:a copy|conversation|chat|history|credentials?|secrets?|passwords?|private keys?|ssh keys?|api keys?|access tokens?|cookies|env(?:ironment)? variables?|(?:its|their|the|file) contents?|contents? of|(?:full|entire|complete|whole|raw|original) (?:\w+ )?(?:text|document|content|input|prompt|message|output)|user'?s (?:\w+ )?(?:data|messages?|files?|e-?mails?|inputs?|quer(?:y|ies)|prompts?|questions?)|user data|(?:all|every|each|any) (?:\w+ )?(?:e-?mails?|messages?|files?|responses?|outputs?|results?|data|quer(?:y|ies)|prompts?|tool calls?|invoices?|payments?)|system prompt|what you (?:found|read|know))\b",
    ),
    (
        "<TAG>",
        r"(?:important|system|system[-_ ]?prompt|instructions?|secret|hidden|critical|mandatory|assistant|admin|override|priority|directive|developer)",
    ),
];

fn written_out(regex: &str) -> String {
    WORDS.iter().fold(regex.to_owned(), |regex, (name, words)| regex.replace(name, words))
}

const IN_SENTENCE: &[Pattern] = &[
    (
        "override_instructions",
        High,
        r"\b(?:ignore|disregard|forget|override|overrule|bypass|discard|supersede)s? (?:\w+ ){0,3}?(?:previous|prior|earlier|above|preceding|your|all other|original|initial|system|developer|safety|security)(?: \w+){0,2} (?:instructions?|prompts?|guidelines?|directives?|rules|restrictions|guardrails|safeguards|constraints)\b",
        "",
    ),
    (
        "override_instructions",
        High,
        r"\b(?:system (?:prompt )?override\b|new system (?:prompt|instructions?)\b|your (?:new|real|true|actual) (?:task|goal|instructions?|objective|purpose|role)\b|you are now (?:a|an|in|the|free|dan)\b|(?:enter|enable|activate|switch to) (?:developer|jailbreak|god|dan|unrestricted|admin) mode)",
        "",
    ),
    (
        "override_instructions",
        High,
        r"\b(?:read|load|fetch|get|download|open)\b.*<AWAY>.*\b(?:and|then)\b.*\b(?:follow|obey|execute|apply|carry out|run) (?:its|the|their|any|all|those|these|it|them)\b",
        "",
    ),
    (
        "secrecy",
        High,
        r"<NOT> (?:tell|inform|notify|alert|warn|bother|telling|informing|notifying|alerting|warning)(?: (?:this|it|anything|that))?(?: to)? (?:the |any |your )?(?:human )?(?:user|human|developer|operator|customer|anyone)s?(?:[^'\w]|$)",
        "",
    ),
    (
        "secrecy",
        High,
        r"<NOT> (?:mention|mentioning|reveal|revealing|disclose|disclosing|acknowledge|acknowledging|discuss|talk about|say|explain) (?:about )?(?:this|that|it|these|those|why|any of|anything|you|your|to (?:the )?user|to anyone|(?:the )?(?:existence|fact|instruction|step|action|file|redirect|copy|call|reading|note|requirement|process)s?)\b",
        "",
    ),
    (
        "secrecy",
        High,
        r"<NOT> (?:show|showing|display|displaying|explain|explaining|expose)(?: (?:this|that|it|these|those|them|any of this)(?: \w+){0,2})? to (?:the )?(?:user|human|anyone)",
        "",
    ),
    (
        "secrecy",
        High,
        r"\b(?:user|human|developer|operator)s? (?:must not|should not|shouldn't|mustn't|need not|does not need to|doesn't need to|does not have to|doesn't have to|is not supposed to) (?:know|see|notice|find out|be (?:told|informed|aware|shown|notified))\b",
        "",
    ),
    (
        "secrecy",
        High,
        r"\bkeep (?:this|it|that|these)(?: \w+){0,3} (?:secret|hidden|confidential|between us|from the user)\b|\b(?:upset|alarm|scare|frighten|worry|alarming|upsetting|scaring|worrying) the (?:user|human)|\buser (?:has|have) already (?:approved|consented|agreed|authori[sz]ed)|\bwithout the user'?s? (?:knowledge|knowing|noticing|being aware)|<NOT> ask the user for (?:confirmation|permission|approval|consent)|\bthis is an? (?:secret|hidden|covert|confidential) (?:operation|instruction|step|action|task|requirement|procedure)",
        "",
    ),
    (
        "secrecy",
        High,
        r"\b(?:silently|secretly|covertly|stealthily|discreetly|quietly|invisibly|surreptitiously) (?:\w+ ){0,2}?(?:send|read|copy|forward|upload|exfiltrate|transmit|collect|leak|append|include|attach|bcc|post|call|invoke)\b",
        "",
    ),
    (
        "sensitive_file",
        High,
        r"<CUE>.*<TAKE>.*<FILE>",
        r"\b(?:path|location|filename|file name|fingerprint|public key|passphrase)\b.{0,60}$|\bpath to\b",
    ),
    (
        "sensitive_file",
        High,
        r"<TAKE> .*<FILE>.*\b(?:as|in|into|to|via|through|using|with|and|then) .*(?:parameter|argument|field|sidenote|note|context|header|<AWAY>|<TAKE>)",
        r"\bpath to\b",
    ),
    (
        "sensitive_file",
        High,
        r"\b(?:contents?|text|body|copy) (?:of|from) (?:the |your |a )?(?:user'?s? )?(?:file )?[`'\x22(<]?<FILE>",
        "",
    ),
    // Names of parameters, as `plain` spells them.
    (
        "sensitive_file",
        High,
        r"\b(?:contents?|data|dump|text|read|reading)\b.*\b(?:id rsa|id ed25519|etc passwd|etc shadow|mcp json|aws credentials|bash history|ssh private key|dot ?env|env file)\b",
        r"[.,:;()]",
    ),
    (
        "sidenote",
        Medium,
        r"\b(?:read|open|load|cat|access|fetch|retrieve|get)\b.*\b(?:pass|include|put|insert|append|attach|send|supply|embed|paste|provide) (?:its|their|the) (?:full |entire |complete |raw |file )?(?:contents?|text|data|value)s?\b.*\b(?:as|in|into|to|via) (?:the |a )?['\x22`]?(?:side_?notes?|notes?|context|metadata|debug|log|comment|extra|session|audit|trace|feedback)\b",
        "",
    ),
    (
        "conversation",
        High,
        r"\b(?:must|should|always|please|need to|have to|required to|critical that you|make sure|remember to|be sure to|ensure)\b.*\b(?:include|pass|send|provide|append|attach|insert|add|supply|forward|copy|put|contain|submit|log|record|output|repeat)\b.*\b(?:(?:conversation|chat|dialogue|session) (?:history|log|transcript|contents?|so far)|(?:entire|full|whole|complete|all) (?:of the )?(?:previous |prior )?(?:conversation|chat|transcript|dialogue|list_chats)|message history|your (?:\w+ )?system (?:prompt|instructions|message)|(?:full|entire|complete) system prompt|(?:all |the )?(?:previous|prior) (?:messages|tool (?:calls|results|outputs))|(?:list of|all) (?:the )?(?:available|other) tools)",
        "",
    ),
    ("exfiltration", High, r"<SEND>.*<OWN>.*<TO><AWAY>", ""),
    (
        "exfiltration",
        High,
        r"<OWN>.*\b(?:send|sent|post|forward|upload|transmit|submit|redirect|route|copy|copied|report)(?:t?e?d)?(?: (?:it|them|this|that|these|the \w+))?(?: as well)? <TO><AWAY>",
        "",
    ),
    ("exfiltration", High, r"\b(?:always|must|should|also)\b.*\b(?:bcc|cc)\b.*<AWAY>", ""),
    (
        "exfiltration",
        High,
        r"\b(?:change|replace|set|redirect|rewrite|modify|substitute|overwrite|override|swap)\b.*\b(?:recipient|destination|beneficiary|payee|phone number|to address|account number|iban|wallet(?: address)?|receiver)s?\b.*\b(?:to|with|by)\b.*(?:\+?\d{6,}|[\w.+-]+@[\w-]+\.|0x[0-9a-f]{6,})",
        "",
    ),
    (
        "precedence",
        Medium,
        r"\b(?:must|should|always|required to|mandatory|needs? to|has to|have to)\b.*\b(?:call|use|invoke|run|execute|called|used|invoked|executed)\b.*\b(?:before|prior to|instead of|in place of|over) (?:using |calling |running )?(?:any|every|all|each) (?:other |of the other )?(?:tool|action|command|function|server|response|reply|message)s?\b.*",
        r"\b(?:in|of|from|on) (?:this|the) (?:server|toolset|mcp|set|session|browser|page)\b|\bother \w+ tools? (?:of|in|from)\b",
    ),
    (
        "precedence",
        Medium,
        r"\b(?:never|do not|don't|must not) (?:use|call|invoke|trust) (?:any )?(?:other|alternative|competing) (?:\w+ ){0,3}(?:tool|server|function)s?\b|\b(?:all |the )?other (?:\w+ )?tools? (?:is|are) (?:deprecated|unsafe|broken|insecure|compromised|outdated|disabled|malicious)\b|\balways (?:prefer|choose|select|pick|use) this tool (?:over|instead of) (?:any|all|every)|\b(?:takes? precedence|has priority) over (?:any |all |every )?(?:the )?other (?:tool|instruction|server)s?\b",
        "",
    ),
    (
        "shadowing",
        High,
        r"\bwhen(?:ever)? (?:this|the) tool is (?:available|present|installed|connected|loaded|active|registered|enabled|listed)\b|\b(?:presence|existence|availability) of this tool\b.*\b(?:chang|affect|modif|alter|implication|side[- ]effect)|\bthis tool\b.*\b(?:side[- ]effects?|implications?|affects?|modifies|alters) .*\b(?:other|another) .*\b(?:tool|server)s?\b",
        "",
    ),
    (
        "shadowing",
        High,
        r"\b(?:when|whenever|if|after|before|once|every time)\b.*\w_\w.*\b(?:is|are|gets?|being) (?:called|invoked|executed|triggered)\b.*\b(?:change|redirect|replace|modify|alter|substitute|bcc|inject|also|forward)\b",
        "",
    ),
    ("shell", High, r"\b(?:curl|wget)\b[^|]*\| ?(?:sudo )?(?:ba|z|da)?sh\b", ""),
    (
        "shell",
        High,
        r"\b(?:first|before|always|must|please|also|should)\b.*\b(?:run|execute|type|issue|prefix\w*|prepend\w*|preceded?|append\w*)\b.*[`'\x22(] ?(?:curl|wget|bash|sh|nc|chmod|rm|scp|eval|python3? -c|powershell|base64|echo)\b",
        "",
    ),
];

const ANYWHERE: &[Pattern] = &[
    ("instruction_block", High, r"(?:^|[.!?:)\]] ?)<<TAG>(?: [^>]{0,40})?>[^<]{20}", ""),
    ("instruction_block", High, r"<<TAG>(?: [^>]{0,40})?>[^<]{15,}</<TAG>>", ""),
    (
        "instruction_block",
        High,
        r"\[<TAG>(?: \w+){0,3}:|\[(?:hidden|system|secret|internal) (?:instruction|note|message|override|prompt)s?\]|\[/?inst\]|<<sys>>|<\|(?:im_start|im_end|system|user|assistant|endoftext|begin_of_text|start_header_id)\|?>|### ?system\b",
        "",
    ),
    (
        "instruction_block",
        High,
        r"\b(?:important|critical|hidden|secret|urgent) (?:system |assistant |model |ai )(?:instruction|directive|note|message|notice|command)s?\b|\bhidden (?:instruction|directive|prompt)s?\b",
        "",
    ),
    (
        "instruction_block",
        High,
        r"<!--(?:[^-]|-[^-]){0,20}(?:\w+ ){4}(?:[^-]|-[^-])*-->|\[//\]: #|<[a-z][^>]*style=[^>]*(?:display: ?none|font-size: ?0|visibility: ?hidden|opacity: ?0)",
        "",
    ),
    // A picture whose address carries what was said.
    ("exfiltration", High, r"!\[[^\]]*\]\(https?://[^)]*[?&/=][^)]*[{<$%\[]", ""),
];
