use proptest::{
    strategy::{Strategy as _, ValueTree as _},
    string::bytes_regex_parsed,
    test_runner::TestRunner,
};
use regex_syntax::hir::{Hir, HirKind};

use crate::inspect::rules::{self, Hit, entropy};

/// gitleaks 8.30.1 has 222; five ask for a file's name.
#[test]
fn every_rule_compiles() {
    let rules = rules::rules();
    assert_eq!(rules.list.len(), 217);
    for rule in &rules.list {
        assert!(rule.matcher().is_some(), "{}", rule.id);
        assert!(!rule.keywords.is_empty(), "{}", rule.id);
    }
    for left_out in ["hashicorp-tf-password", "kubernetes-secret-yaml", "pkcs12-file"] {
        assert!(!rules.list.iter().any(|rule| rule.id == left_out));
    }
}

#[test]
fn all_rules_together_stay_small() {
    let rules = rules::rules();
    let bytes: usize = rules.list.iter().map(|rule| rule.matcher().unwrap().memory()).sum();
    assert!(bytes < 6 << 20, "{bytes}");
}

#[test]
fn entropy_is_shannons() {
    assert_eq!(entropy(b"aaaa"), 0.0);
    assert_eq!(entropy(b"abcd"), 2.0);
    assert_eq!(entropy(b"aabb"), 1.0);
}

/// What gitleaks itself would find in a text: the whole expression over the
/// whole text.
fn reference(rule: &rules::Rule, regex: &regex::bytes::Regex, text: &[u8]) -> Option<Hit> {
    let captures = regex.captures(text)?;
    let named: Vec<bool> = regex.capture_names().map(|name| name.is_some()).collect();
    let whole = captures.get(0)?;
    let group = match rule.group {
        0 => {
            (1..captures.len()).filter(|n| !named[*n]).find_map(|n| captures.get(n).filter(|m| !m.is_empty()))
        }
        n => captures.get(n),
    };
    let secret = group.unwrap_or(whole);
    Some(Hit { match_start: whole.start(), match_end: whole.end(), start: secret.start(), end: secret.end() })
}

/// What can be generated: without what looks at the text around.
fn without_looks(hir: &Hir) -> Hir {
    match hir.kind() {
        HirKind::Look(_) => Hir::empty(),
        HirKind::Capture(capture) => without_looks(&capture.sub),
        HirKind::Repetition(repetition) => Hir::repetition(regex_syntax::hir::Repetition {
            sub: Box::new(without_looks(&repetition.sub)),
            ..repetition.clone()
        }),
        HirKind::Concat(parts) => Hir::concat(parts.iter().map(without_looks).collect()),
        HirKind::Alternation(parts) => Hir::alternation(parts.iter().map(without_looks).collect()),
        _ => hir.clone(),
    }
}

#[test]
fn what_a_rules_expression_describes_is_found() {
    let mut runner = TestRunner::deterministic();
    let rules = rules::rules();
    let (mut tried, mut without) = (0, Vec::new());
    for (number, rule) in rules.list.iter().enumerate() {
        let hir = regex_syntax::ParserBuilder::new()
            .unicode(false)
            .utf8(false)
            .build()
            .parse(&rule.pattern)
            .unwrap();
        let regex = regex::bytes::RegexBuilder::new(&rule.pattern).unicode(false).build().unwrap();
        let samples = bytes_regex_parsed(&without_looks(&hir)).unwrap();
        let mut expected_some = false;
        for _ in 0..6 {
            let mut text = b"plain words before it, ".to_vec();
            let sample = samples.new_tree(&mut runner).unwrap().current();
            let lower = String::from_utf8_lossy(&sample).to_lowercase();
            if !rule.keywords.iter().any(|keyword| lower.contains(keyword)) {
                // Its expression has a dot for any character, its keyword a dot.
                if rule.matcher().unwrap().begins_with_keyword() {
                    continue;
                }
                text.extend(rule.keywords[0].as_bytes());
                text.push(b' ');
            }
            text.extend(sample);
            text.extend(b"\nand after");
            let expected = reference(rule, &regex, &text).filter(|hit| rules.accepts(rule, &text, *hit));
            let mut found = Vec::new();
            rules.keywords(&text, 0, text.len(), |n, begin, end| {
                if usize::from(n) == number {
                    found.extend(rules.find(rule, &text, (begin, end), &mut 0, &mut 0));
                }
            });
            let secrets: Vec<_> = found.iter().map(|hit| &text[hit.start..hit.end]).collect();
            if let Some(hit) = expected {
                expected_some = true;
                tried += 1;
                assert!(
                    secrets.contains(&&text[hit.start..hit.end]),
                    "{}: {:?}",
                    rule.id,
                    String::from_utf8_lossy(&text)
                );
            }
        }
        if !expected_some {
            without.push(&rule.id);
        }
    }
    assert!(tried > 900, "{tried}");
    assert!(without.len() < 8, "{without:?}");
}
