use crate::{
    inspect::{Found, Key, Limits, Scanner},
    mcp::{Sender, Values as _},
};

fn scan(values: &[(&str, &str)]) -> Vec<Found> {
    let mut scanner = Scanner::new(Key::new(&[7; 32]), Limits::default());
    for (place, value) in values {
        scanner.piece(place, value, true);
    }
    scanner.message(Sender::Client, "tools/call", "x");
    assert_eq!(scanner.unscanned(), 0);
    scanner.take()
}

#[test]
fn a_token_is_found_with_its_place_and_length() {
    let found = scan(&[("/params/arguments/text", "use ghp_012345678901234567890123456789abCDeF now")]);
    let [one] = &found[..] else { panic!("{found:?}") };
    assert_eq!(
        (one.rule, one.place.as_str(), one.length, one.count),
        ("github-pat", "/params/arguments/text", 40, 1)
    );
}
