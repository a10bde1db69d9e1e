use super::*;

#[test]
fn show() {
    for text in [
        "",
        "version: 2",
        "version: 1\nprofiles:\n  a:\n    egres: []\n",
        "version: 1\nversion: 1\n",
        "version: 1\nservers: {}\n",
        "version: 1\nservers:\n  - {name: a, profile: [x]}\n",
        "version: 1\nprofiles: {x: {egress: [{to: [10.0.0.1], ports: 443}]}}",
        "version: 1\nprofiles: {x: {egress: [{to: [10.0.0.1], protocol: 6}]}}",
        "version: 1\nprofiles: {x: {egress: [{to: [10.0.0.1], ports: [70000]}]}}",
        "version: 1\nprofiles:\n  x:\n    egress:\n      - to: [~]\n",
        "version: 1\nprofiles:\n  x:\n    egress:\n",
        "version: 1\nprofiles:\n  x:\n",
        "version: 1\nprofiles: {x: {egress: [{to: \"a\0b\"}]}}",
        "version: 1\nprofiles:\n  x: {<<: {}}\n",
        "version: 1\na: [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    ] {
        match try_compiled(text) {
            Ok(_) => println!("OK {text:?}"),
            Err(e) => println!("{}", super::super::diagnostic::render(&e, "p.yaml", text, false)),
        }
    }
}
