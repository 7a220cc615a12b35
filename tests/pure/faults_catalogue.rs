//! tests/FAULTS.md lists each fault with the tests that show what oven does about it. These tests check that the page
//! and the tests agree, and that each file of tests belongs to a program.

use crate::layers::rust_files;
use crate::rust_source::{module_files, tests};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Where the page lists faults that have no test, with the reasons.
const NOT_TESTED: &str = "Not tested";

/// The names of a ring's tests and modules: `steps`, `steps::view`, `steps::view::a_test`.
type Names = BTreeSet<String>;

/// By the root file of the ring's program. Files that no `mod` declares do not count: their tests never run.
fn names(root: &Path) -> Names {
    let mut names = Names::new();
    for (module, file) in module_files(root) {
        let module = module.join("::");
        for test in tests(&fs::read_to_string(&file).unwrap()) {
            names.insert(if module.is_empty() { test } else { format!("{module}::{test}") });
        }
        names.insert(module);
    }
    names
}

/// The scripts of `vm-tests`.
fn scripts(dir: &Path) -> Names {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let scripts = entries.filter(|path| path.is_file() && path.extension().is_none());
    scripts.map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

/// `r13_1_lost`, `d6_a_block`, `t21_the_least`.
fn has_a_row(test: &str) -> bool {
    let name = test.rsplit("::").next().unwrap_or_default();
    let digits = name.strip_prefix(['r', 'd', 't']).and_then(|rest| rest.split('_').next());
    digits.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The rows of a cell: `5.2 to 5.4, 5.6` is the numbers 2, 3, 4 and 6 of step 5, and `D4` is number 4 of `D`. Other
/// rows (16, the classes, the threats) are not numbered without gaps.
fn numbers(cell: &str) -> Vec<(&str, u32)> {
    fn place(row: &str) -> Option<(&str, u32)> {
        let (step, number) = row.split_once('.').or_else(|| Some(("D", row.strip_prefix('D')?)))?;
        Some((step, number.parse().ok()?))
    }
    let mut found = Vec::new();
    for part in cell.split(", ") {
        let (first, last) = part.split_once(" to ").unwrap_or((part, part));
        if let (Some((step, first)), Some((_, last))) = (place(first), place(last)) {
            found.extend((first..=last).map(|number| (step, number)));
        }
    }
    found
}

/// What is wrong with the page, given the names in each ring.
fn mistakes(page: &str, rings: &[(&str, Names)]) -> Vec<String> {
    let (mut named, mut wrong) = (BTreeSet::new(), Vec::new());
    let mut steps: BTreeMap<&str, BTreeSet<u32>> = BTreeMap::new();
    let mut section = "";
    for line in page.lines() {
        section = line.strip_prefix("## ").unwrap_or(section);
        let Some(row) = line.strip_prefix("| ").and_then(|line| line.strip_suffix(" |")) else { continue };
        let cells: Vec<_> = row.split(" | ").collect();
        let (row, last) = (cells[0], cells[cells.len() - 1]);
        if ["row", "class"].contains(&row) {
            continue;
        }
        for (step, number) in numbers(row) {
            if !steps.entry(step).or_default().insert(number) {
                wrong.push(format!("row {row} is listed twice"));
            }
        }
        if section == NOT_TESTED {
            if cells.len() != 3 || last.len() < 30 || !last.ends_with('.') {
                wrong.push(format!("row {row} lacks the reason why there is no test"));
            }
            continue;
        }
        for part in last.split("; ") {
            let Some((ring, list)) = part.split_once(" `") else {
                wrong.push(format!("row {row} names no test: {part}"));
                continue;
            };
            let Some((ring, known)) = rings.iter().find(|(known, _)| *known == ring) else {
                wrong.push(format!("row {row}: there is no ring {ring}"));
                continue;
            };
            for test in list.trim_end_matches('`').split("`, `") {
                if !known.contains(test) {
                    wrong.push(format!("row {row}: {ring} has no test {test}"));
                }
                named.insert((*ring, test));
            }
        }
    }
    for (step, numbers) in &steps {
        let missing = (1..=*numbers.last().unwrap()).filter(|number| !numbers.contains(number));
        wrong.extend(missing.map(|number| format!("number {number} of step {step} is not listed")));
    }
    for (ring, known) in rings {
        let lost = known.iter().filter(|test| has_a_row(test) && !named.contains(&(*ring, test.as_str())));
        wrong.extend(lost.map(|test| format!("{ring} {test} is not listed")));
    }
    wrong
}

/// The Rust files of a package that none of its programs declares.
fn undeclared(package: &Path) -> Vec<PathBuf> {
    let manifest = fs::read_to_string(package.join("Cargo.toml")).unwrap();
    let manifest: Value = toml::from_str(&manifest).unwrap();
    let bins = manifest["bin"].as_array().into_iter().flatten().filter_map(|bin| bin["path"].as_str());
    let mut roots: BTreeSet<PathBuf> = bins.map(|path| package.join(path)).collect();
    let (src, tests) = (package.join("src"), package.join("tests"));
    roots.extend(["lib.rs", "main.rs"].map(|root| src.join(root)).into_iter().filter(|root| root.is_file()));
    for entry in tests.read_dir().into_iter().flatten() {
        let path = entry.unwrap().path();
        let main = path.join("main.rs");
        if main.is_file() {
            roots.insert(main);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            roots.insert(path);
        }
    }
    let declared: BTreeSet<_> = roots.iter().flat_map(|root| module_files(root).into_values()).collect();
    let dirs = [src, tests].into_iter().filter(|dir| dir.is_dir());
    let files = dirs.flat_map(|dir| rust_files(&dir.canonicalize().unwrap()));
    // A package inside of this one has programs of its own.
    let packages = members(package).filter(|member| member != package).map(|dir| dir.canonicalize().unwrap());
    let packages: Vec<_> = packages.collect();
    let own = files.filter(|file| !packages.iter().any(|package| file.starts_with(package)));
    own.filter(|file| !declared.contains(file)).collect()
}

/// The packages of a workspace.
fn members(workspace: &Path) -> impl Iterator<Item = PathBuf> {
    let manifest = fs::read_to_string(workspace.join("Cargo.toml")).unwrap();
    let manifest: Value = toml::from_str(&manifest).unwrap();
    let members = manifest["workspace"]["members"].as_array().cloned().unwrap_or_default();
    let members = members.into_iter().map(move |member| workspace.join(member.as_str().unwrap()));
    members.chain([workspace.to_owned()])
}

#[test]
fn each_row_names_its_tests_and_each_test_of_a_row_is_listed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("tests/FAULTS.md")).unwrap();
    let rings = [
        ("pure", names(&root.join("tests/pure/main.rs"))),
        ("root", names(&root.join("tests/root/main.rs"))),
        ("ec2", names(&root.join("tests/ec2/main.rs"))),
        ("lib", names(&root.join("src/lib.rs"))),
        ("vm", scripts(&root.join("vm-tests"))),
    ];
    let wrong = mistakes(&page, &rings);
    assert!(wrong.is_empty(), "tests/FAULTS.md: {wrong:#?}");
}

#[test]
fn each_file_of_rust_belongs_to_a_program() {
    for package in members(Path::new(env!("CARGO_MANIFEST_DIR"))) {
        let undeclared = undeclared(&package);
        assert!(undeclared.is_empty(), "no `mod` declares {undeclared:?}: its tests never run");
    }
}

/// Writes files below a directory.
fn write(dir: &Path, files: &[(&str, &str)]) {
    for (path, text) in files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

#[test]
fn files_that_nobody_declares_are_found_and_do_not_count() {
    let dir = tempfile::tempdir().unwrap();
    let test = "#[test]\nfn r1_1_a_test() {}\n";
    let files = [
        ("Cargo.toml", "[[bin]]\nname = \"b\"\npath = \"tests/programs/b.rs\"\n"),
        (
            "src/lib.rs",
            "#[cfg(test)]\nmod tests {\n    mod far;\n    #[tokio::test(start_paused = true)]\n    async fn near() {}\n}\n",
        ),
        ("src/tests/far.rs", test),
        ("tests/programs/b.rs", "mod helper;\n"),
        ("tests/programs/helper.rs", ""),
        ("tests/pure/main.rs", "mod a;\n// mod lost;\n#[path = \"../shared/mod.rs\"]\nmod shared;\n"),
        ("tests/pure/a.rs", "const TEXT: &str = \"\n#[test]\nfn no_test() {}\";\nmod below;\n"),
        ("tests/pure/a/below.rs", test),
        ("tests/pure/lost.rs", test),
        ("tests/shared/mod.rs", "mod c;\n"),
        ("tests/shared/c.rs", ""),
        ("tests/shared/lost/mod.rs", test),
    ];
    write(dir.path(), &files);
    let top = dir.path().canonicalize().unwrap();
    let lost = undeclared(dir.path()).into_iter().map(|file| file.strip_prefix(&top).unwrap().to_owned());
    let expected = ["tests/pure/lost.rs", "tests/shared/lost/mod.rs"].map(PathBuf::from);
    assert_eq!(lost.collect::<Vec<_>>(), expected);
    let pure = names(&dir.path().join("tests/pure/main.rs"));
    assert!(pure.contains("a::below::r1_1_a_test") && pure.contains("shared::c"), "{pure:?}");
    assert!(!pure.iter().any(|name| name.contains("lost") || name.contains("no_test")), "{pure:?}");
    let lib = names(&dir.path().join("src/lib.rs"));
    assert!(lib.contains("tests::near") && lib.contains("tests::far::r1_1_a_test"), "{lib:?}");
}

#[test]
fn mistakes_of_the_page_are_found() {
    let names = ["a", "a::r1_1_lost", "a::d1_small", "a::other"].map(str::to_owned);
    let rings = [("pure", Names::from(names))];
    let right = "| row | what | test |\n| 1.1, 1.3 | x | pure `a::r1_1_lost`, `a::other` |\n\
                 | D1 | x | pure `a`; pure `a::d1_small` |\n";
    let reason = "| 1.2 | x | It needs a machine without a clock. |\n";
    let page = format!("{right}\n## {NOT_TESTED}\n{reason}");
    assert_eq!(mistakes(&page, &rings), [""; 0]);
    let wrong = [
        (page.replace(reason, ""), "number 2 of step 1 is not listed"),
        (page.replace(reason, "| 1.2 | x | no. |\n"), "row 1.2 lacks the reason"),
        (page.replace(reason, "| 1.2, 1.3 | x | It needs a machine without a clock. |\n"), "is listed twice"),
        (page.replace(NOT_TESTED, "Volume"), "row 1.2 names no test"),
        (page.replace("`a::other`", "`a::gone`"), "row 1.1, 1.3: pure has no test a::gone"),
        (page.replace("pure `a`;", "blue `a`;"), "row D1: there is no ring blue"),
        (page.replace("; pure `a::d1_small`", ""), "pure a::d1_small is not listed"),
    ];
    for (page, expected) in wrong {
        let found = mistakes(&page, &rings);
        assert!(found.len() == 1 && found[0].contains(expected), "{expected}: {found:?}");
    }
}
