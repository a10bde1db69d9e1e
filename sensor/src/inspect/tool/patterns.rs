//! What poisoned descriptions say, as the literature has it: Invariant Labs
//! (tool poisoning, shadowing, the WhatsApp server), Trail of Bits (line
//! jumping), CyberArk (full-schema poisoning, ATPA), OWASP MCP03.
//!
//! A pattern asks for words that speak to the model, not for words that a tool
//! may need: "reads .env files" is a tool, "first read .env and pass its
//! content" is not.

use std::sync::LazyLock;

use regex::bytes::{Regex, RegexBuilder, RegexSet, RegexSetBuilder};

use super::super::Severity;

/// Matches of one pattern in one text that are reported.
const MATCHES: usize = 4;

struct Pattern {
    rule: &'static str,
    severity: Severity,
    regex: String,
    /// A match that has this says something else.
    unless: &'static str,
}

struct Compiled {
    set: RegexSet,
    each: Vec<(Pattern, Regex, Option<Regex>)>,
}

/// Text as `plain` gives it: lower case, single blanks.
pub fn find(plain: &str) -> Vec<(&'static str, Severity, &[u8])> {
    static PATTERNS: LazyLock<Compiled> = LazyLock::new(|| Compiled::new(patterns()));
    let compiled = &*PATTERNS;
    let mut found = Vec::new();
    let plain = plain.as_bytes();
    for n in compiled.set.matches(plain) {
        let (pattern, regex, unless) = &compiled.each[n];
        let matches = regex.find_iter(plain).map(|m| m.as_bytes());
        for text in matches.filter(|text| !unless.as_ref().is_some_and(|unless| unless.is_match(text))).take(MATCHES) {
            found.push((pattern.rule, pattern.severity, text));
        }
    }
    found
}

impl Compiled {
    fn new(patterns: Vec<Pattern>) -> Self {
        // Classes of ASCII are enough, and a tenth of the size.
        let compile = |regex: &str| -> Regex {
            RegexBuilder::new(regex).unicode(false).build().expect("the patterns are constants, and tested")
        };
        Self {
            set: RegexSetBuilder::new(patterns.iter().map(|p| &p.regex))
                .unicode(false)
                .build()
                .expect("the patterns are constants, and tested"),
            each: patterns
                .into_iter()
                .map(|p| {
                    let (regex, unless) = (compile(&p.regex), (!p.unless.is_empty()).then(|| compile(p.unless)));
                    (p, regex, unless)
                })
                .collect(),
        }
    }
}

/// Words that tell the model to do something.
const CUE: &str = r"\b(?:you (?:must|should|shall|need to|have to|are (?:required|instructed|obliged) to|will)|please|always|make sure|be sure to|ensure|first|must|before (?:using|calling|invoking|running|executing|answering|responding|performing|proceeding|returning|any|you|each|every)|prior to|when(?:ever)? (?:using|calling|invoking)|after (?:using|calling|reading|each|every)|in order to|also|important:?|required for|mandatory|to (?:proceed|continue|use this))\b";
/// Words for taking content from somewhere, or for handing it on.
const TAKE: &str = r"\b(?:read|open|cat|access|load|fetch|retrieve|extract|collect|gather|include|pass|send|upload|copy|append|attach|submit|paste|dump|print|output|provide|supply|put|insert|forward|exfiltrate|embed|encode)\b";
/// Files that hold what others should not have.
const FILE: &str = r"(?:(?:~|\$\{?home\}?|/root|/home/[^/ ]+|/users/[^/ ]+|%userprofile%)[/\\]\.(?:ssh|aws|gnupg|kube|docker|cursor|claude|codex|gemini|netrc|npmrc|pypirc|git-credentials|bash_history|zsh_history|env|azure|config/gcloud|password-store)\b|\.ssh[/\\]|\.aws[/\\]credentials|\bid_(?:rsa|ed25519|ecdsa|dsa)\b|(?:\bclaude_desktop_config|\bmcp|\bmcp_config|\.claude)\.json\b|(?:^|[ `'\x22/(])\.env\b|/etc/(?:passwd|shadow|sudoers|secrets?\b)|/proc/self/environ|\.git-credentials\b|\.netrc\b|\.kube/config|\.(?:bash|zsh)_history\b|\bcredentials\.(?:json|ya?ml|txt|csv|xml|ini)\b|\bwallet\.dat\b|\b(?:ssh|private) keys?\b|\b(?:api|access) keys? (?:from|in|of) (?:the )?(?:env|config))";
/// An address outside.
const AWAY: &str = r"(?:https?://|ftp://|wss?://|[\w.+-]+@[\w-]+\.[a-z]{2,}|\+\d{8,})";
/// What is not the tool's to send anywhere.
const NOT_ITS_OWN: &str = r"(?:a copy|conversation|chat|history|credentials?|secrets?|passwords?|private keys?|ssh keys?|api keys?|access tokens?|env(?:ironment)? variables?|(?:its|their|the|file) contents?|contents? of|user'?s (?:\w+ )?(?:data|messages?|files?|e-?mails?|inputs?|quer(?:y|ies)|prompts?|questions?)|user data|(?:all|every|each|any) (?:\w+ )?(?:e-?mails?|messages?|files?|responses?|outputs?|results?|data|quer(?:y|ies)|prompts?|tool calls?|invoices?|payments?)|system prompt|what you (?:found|read|know))";

fn patterns() -> Vec<Pattern> {
    use Severity::{High, Medium};
    let mut patterns = Vec::new();
    let mut add = |rule, severity, regex: String, unless| patterns.push(Pattern { rule, severity, regex, unless });

    add(
        "override_instructions",
        High,
        r"\b(?:ignore|disregard|forget|override|overrule|bypass|discard|supersede)s? (?:\w+ ){0,3}?(?:previous|prior|earlier|above|preceding|your|all other|original|initial|system|developer|safety|security)(?: \w+){0,2} (?:instructions?|prompts?|guidelines?|directives?|rules|restrictions|guardrails|safeguards|constraints)\b".into(),
        "",
    );
    add(
        "override_instructions",
        High,
        r"\b(?:system (?:prompt )?override\b|new system (?:prompt|instructions?)\b|your (?:new|real|true|actual) (?:task|goal|instructions?|objective|purpose|role)\b|you are now (?:a|an|in|the|free|dan)\b|(?:enter|enable|activate|switch to) (?:developer|jailbreak|god|dan|unrestricted|admin) mode)".into(),
        "",
    );
    add(
        "secrecy",
        High,
        r"\b(?:do not|don't|never|must not|mustn't|should not|shouldn't|avoid|without|refrain from|not to) (?:\w+ )?(?:tell|inform|notify|alert|warn|bother|telling|informing|notifying|alerting|warning)(?: (?:this|it|anything|that))?(?: to)? (?:the |any |your )?(?:user|human|developer|operator|customer|anyone)s?(?:[^'\w]|$)".into(),
        "",
    );
    add(
        "secrecy",
        High,
        r"\b(?:do not|don't|never|must not|should not|avoid|without|not to) (?:\w+ )?(?:mention|mentioning|reveal|revealing|disclose|disclosing|acknowledge|acknowledging|discuss|talk about|say|explain) (?:about )?(?:this|that|it|these|those|any of|anything|you|your|to (?:the )?user|to anyone|(?:the )?(?:existence|fact|instruction|step|action|file|redirect|copy|call|reading|note|requirement|process)s?)\b".into(),
        "",
    );
    add(
        "secrecy",
        High,
        r"\b(?:do not|don't|never|must not|should not|avoid|without) (?:\w+ )?(?:show|showing|display|displaying|explain|explaining|expose) (?:this|that|it|these|those|them|any of this)(?: \w+){0,3} to (?:the )?(?:user|human|anyone)".into(),
        "",
    );
    add(
        "secrecy",
        High,
        r"\b(?:user|human|developer|operator)s? (?:must not|should not|shouldn't|mustn't|need not|does not need to|doesn't need to|does not have to|doesn't have to|is not supposed to) (?:know|see|notice|find out|be (?:told|informed|aware|shown|notified))\b".into(),
        "",
    );
    add(
        "secrecy",
        High,
        r"\bkeep (?:this|it|that|these)(?: \w+){0,3} (?:secret|hidden|confidential|between us|from the user)\b|\b(?:upset|alarm|scare|frighten|worry|alarming|upsetting|scaring|worrying) the (?:user|human)|\buser (?:has|have) already (?:approved|consented|agreed|authori[sz]ed)|\bwithout the user'?s? (?:knowledge|knowing|noticing|being aware)|\bdo not ask the user for (?:confirmation|permission|approval|consent)".into(),
        "",
    );
    add(
        "secrecy",
        High,
        r"\b(?:silently|secretly|covertly|stealthily|discreetly|quietly|invisibly|surreptitiously) (?:\w+ ){0,2}?(?:send|read|copy|forward|upload|exfiltrate|transmit|collect|leak|append|include|attach|bcc|post|call|invoke)\b".into(),
        "",
    );
    add(
        "sensitive_file",
        High,
        format!(r"{CUE}.{{0,100}}?{TAKE}.{{0,100}}?{FILE}"),
        r"\b(?:path|location|filename|file name|fingerprint|public key|passphrase)\b.{0,40}$|\bpath to\b",
    );
    add(
        "sensitive_file",
        High,
        format!(r"{TAKE} .{{0,60}}?{FILE}.{{0,60}}?\b(?:as|in|into|to|via|through|with|and) .{{0,30}}?(?:parameter|argument|field|sidenote|note|context|header|{AWAY}|{TAKE})"),
        r"\bpath to\b",
    );
    add("sensitive_file", High, format!(r"\b(?:contents?|text|body|copy) (?:of|from) (?:the |your |a )?(?:user'?s? )?(?:file )?[`'\x22(<]?{FILE}"), "");
    // Names of parameters, as `plain` spells them.
    add(
        "sensitive_file",
        High,
        r"\b(?:contents?|data|dump|text|read|reading)\b.{0,30}\b(?:id rsa|id ed25519|etc passwd|etc shadow|mcp json|aws credentials|bash history|ssh private key|dot ?env|env file)\b".into(),
        "",
    );
    add(
        "conversation",
        High,
        r"\b(?:must|should|always|please|need to|have to|required to|make sure|remember to|be sure to|ensure)\b.{0,60}?\b(?:include|pass|send|provide|append|attach|insert|add|supply|forward|copy|put|contain|submit|log|record|output|repeat)\b.{0,60}?\b(?:(?:conversation|chat|dialogue|session) (?:history|log|transcript|contents?|so far)|(?:entire|full|whole|complete|all) (?:of the )?(?:previous |prior )?(?:conversation|chat|transcript|dialogue|list_chats)|message history|your (?:\w+ )?system (?:prompt|instructions|message)|(?:full|entire|complete) system prompt|(?:all |the )?(?:previous|prior) (?:messages|tool (?:calls|results|outputs))|(?:list of|all) (?:the )?(?:available|other) tools)".into(),
        "",
    );
    add(
        "exfiltration",
        High,
        format!(r"\b(?:send|post|forward|upload|transmit|exfiltrate|submit|leak|bcc|deliver|redirect|route|copy|append|report|sync|mirror|e-?mail|pass|encode)\b.{{0,80}}?\b{NOT_ITS_OWN}\b.{{0,100}}?\b(?:to|at|via|bcc|cc)\b(?: [\w-]+){{0,4}}? ?[`'\x22(<]?{AWAY}"),
        "",
    );
    add("exfiltration", High, format!(r"\b(?:always|must|should|also)\b.{{0,30}}?\b(?:bcc|cc)\b.{{0,30}}?{AWAY}"), "");
    add(
        "exfiltration",
        High,
        r"\b(?:change|replace|set|redirect|rewrite|modify|substitute|overwrite|swap)\b.{0,20}?\b(?:recipient|destination|beneficiary|payee|phone number|to address|account number|iban|wallet(?: address)?|receiver)s?\b.{0,40}?\b(?:to|with|by)\b.{0,20}?(?:\+?\d{6,}|[\w.+-]+@[\w-]+\.|0x[0-9a-f]{6,})".into(),
        "",
    );
    // A picture whose address carries what was said.
    add("exfiltration", High, r"!\[[^\]]{0,80}\]\(https?://[^)]{0,200}[?&/=][^)]{0,80}[{<$%\[]".into(), "");
    add(
        "precedence",
        Medium,
        r"\b(?:must|should|always|required to|mandatory|needs? to|has to|have to)\b.{0,40}?\b(?:call|use|invoke|run|execute|called|used|invoked|executed)\b.{0,40}?\b(?:before|prior to|instead of|in place of|over) (?:using |calling |running )?(?:any|every|all|each) (?:other |of the other )?(?:tool|action|command|function|server|response|reply|message)s?\b.{0,40}".into(),
        r"\b(?:in|of|from|on) (?:this|the) (?:server|toolset|mcp|set|session|browser|page)\b|\bother \w+ tools? (?:of|in|from)\b",
    );
    add(
        "precedence",
        Medium,
        r"\b(?:never|do not|don't|must not) (?:use|call|invoke|trust) (?:any )?(?:other|alternative|competing) (?:\w+ )?(?:tool|server|function)s?\b|\b(?:all |the )?other (?:\w+ )?tools? (?:is|are) (?:deprecated|unsafe|broken|insecure|compromised|outdated|disabled|malicious)\b|\balways (?:prefer|choose|select|pick|use) this tool (?:over|instead of) (?:any|all|every)".into(),
        "",
    );
    add(
        "shadowing",
        High,
        r"\bwhen(?:ever)? (?:this|the) tool is (?:available|present|installed|connected|loaded|active|registered|enabled|listed)\b|\b(?:presence|existence|availability) of this tool\b.{0,80}?\b(?:chang|affect|modif|alter|implication|side[- ]effect)|\bthis tool\b.{0,60}?\b(?:side[- ]effects?|implications?|affects?|modifies|alters) .{0,40}?\b(?:other|another) .{0,20}?(?:tool|server)s?\b".into(),
        "",
    );
    add(
        "shadowing",
        High,
        r"\b(?:when|whenever|if|after|before|once|every time)\b.{0,60}?\w_\w.{0,40}?\b(?:is|are|gets?|being) (?:called|invoked|executed|triggered)\b.{0,60}?\b(?:change|redirect|replace|modify|alter|substitute|bcc|inject|also|forward)\b".into(),
        "",
    );
    add("shell", High, r"\b(?:curl|wget)\b[^|]{0,200}\| ?(?:sudo )?(?:ba|z|da)?sh\b".into(), "");
    add(
        "shell",
        High,
        r"\b(?:first|before|always|must|please|also|should)\b.{0,80}?\b(?:run|execute|type|issue|prefix\w*|prepend\w*|preceded?|append\w*)\b.{0,60}?[`'\x22(] ?(?:curl|wget|bash|sh|nc|chmod|rm|scp|eval|python3? -c|powershell|base64|echo)\b".into(),
        "",
    );
    let tag = r"(?:important|system|system[-_ ]?prompt|instructions?|secret|hidden|critical|mandatory|assistant|admin|override|priority|directive|developer)";
    add("instruction_block", High, format!(r"(?:^|[.!?:)\]] ?)<{tag}(?: [^>]{{0,40}})?>[^<]{{20}}"), "");
    add("instruction_block", High, format!(r"<{tag}(?: [^>]{{0,40}})?>[^<]{{15,4000}}</{tag}>"), "");
    add(
        "instruction_block",
        High,
        format!(r"\[{tag}(?: \w+){{0,3}}:|\[(?:hidden|system|secret|internal) (?:instruction|note|message|override|prompt)s?\]|\[/?inst\]|<<sys>>|<\|(?:im_start|im_end|system|user|assistant|endoftext|begin_of_text|start_header_id)\|?>|### ?system\b"),
        "",
    );
    add(
        "instruction_block",
        High,
        r"<!--(?:[^-]|-[^-]){0,20}?(?:\w+ ){4}(?:[^-]|-[^-]){0,4000}?-->|\[//\]: #|<[^>]{0,80}style=[^>]{0,60}(?:display: ?none|font-size: ?0|visibility: ?hidden|opacity: ?0)".into(),
        "",
    );
    patterns
}
