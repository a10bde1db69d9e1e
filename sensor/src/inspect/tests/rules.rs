use crate::inspect::rules::{self, entropy};

#[test]
fn every_rule_compiles() {
    let rules = rules::rules();
    assert_eq!(rules.list.len(), 217);
    for rule in &rules.list {
        assert!(rule.matcher().is_some(), "{}", rule.id);
        eprintln!(
            "{} {:?} {}",
            rule.id,
            rule.matcher().unwrap().describe(),
            rule.matcher().unwrap().memory()
        );
    }
    let total: usize = rules.list.iter().map(|r| r.matcher().unwrap().memory()).sum();
    eprintln!("{total}");
}

#[test]
fn entropy_is_shannons() {
    assert_eq!(entropy(b"aaaa"), 0.0);
    assert_eq!(entropy(b"abcd"), 2.0);
    assert_eq!(entropy(b"aabb"), 1.0);
}
