//! tests/FAULTS.md says which test shows what becomes of a fault: every test that it names is there, and every test
//! that
//! is named by a row is in it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The modules of a ring, and its tests, by their paths: `steps`, `steps::view`, `steps::view::a_test`.
fn names(ring: &str) -> BTreeSet<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(ring);
    let (mut names, mut dirs) = (BTreeSet::new(), vec![root.clone()]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
                continue;
            }
            let module = path.strip_prefix(&root).unwrap().with_extension("");
            let module = module.to_str().unwrap().replace('/', "::");
            let module = module.strip_suffix("::mod").unwrap_or(&module);
            let Ok(text) = fs::read_to_string(&path) else { continue };
            names.insert(module.to_owned());
            names.extend(tests(&text).map(|test| format!("{module}::{test}")));
        }
    }
    names
}

/// The functions after `#[test]` or `#[tokio::test]`.
fn tests(text: &str) -> impl Iterator<Item = &str> {
    let parts = text.split("#[test]").flat_map(|part| part.split("#[tokio::test]")).skip(1);
    parts.filter_map(|part| part.split_once("fn ")?.1.split('(').next())
}

/// `r13_1_lost`, `d6_a_block`, `t21_the_least`.
fn has_a_row(test: &str) -> bool {
    let name = test.rsplit("::").next().unwrap_or_default();
    let digits = name.strip_prefix(['r', 'd', 't']).and_then(|rest| rest.split('_').next());
    digits.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

#[test]
fn it_names_tests_that_are_there_and_all_that_have_a_row() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/FAULTS.md");
    let page = fs::read_to_string(page).unwrap();
    let rows =
        page.lines().filter_map(|line| line.strip_prefix("| ")?.trim_end_matches(" |").rsplit_once(" | "));
    let (mut named, mut wrong) = (BTreeSet::new(), Vec::new());
    let rings = ["pure", "root", "ec2"].map(|ring| (ring, names(ring)));
    for (_, cell) in rows {
        for part in cell.split("; ") {
            let Some((ring, there)) = rings.iter().find(|(ring, _)| part.starts_with(&format!("{ring} `")))
            else {
                continue;
            };
            for test in part.split('`').skip(1).step_by(2) {
                if !there.contains(test) {
                    wrong.push(format!("{ring} {test} is not there"));
                }
                named.insert((*ring, test.to_owned()));
            }
        }
    }
    assert!(named.len() > 100, "{}", named.len());
    for (ring, there) in &rings {
        for test in there.iter().filter(|test| has_a_row(test)) {
            if !named.contains(&(*ring, test.clone())) {
                wrong.push(format!("{ring} {test} is not in tests/FAULTS.md"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
