//! The limits of a definition, which somebody else may have written. Nothing outside of its project is looked at.

use super::*;
use crate::config::project::Settings;
use crate::definition::graph::BakeOrder;
use std::time::{Duration, Instant};

const AMI: &str = "from = \"ami-0123456789abcdef0\"\n";
const KEY: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nABCD\n-----END PGP PUBLIC KEY BLOCK-----\n";

fn repositories(count: usize) -> String {
    let one = |i| format!("[[repository]]\nname = \"r{i}\"\nurl = \"https://r.example\"\nkey = \"k\"\n");
    (0..count).map(one).collect()
}

#[test]
fn the_number_of_entries_is_limited() {
    let top = tree();
    std::fs::write(top.path().join("web/k"), KEY).unwrap();
    let load = |toml: &str| load(top.path(), &format!("{AMI}{toml}"));
    assert_eq!(load(&repositories(100)).unwrap().repositories.len(), 100);
    assert_eq!(
        load(&repositories(103)).unwrap_err(),
        "DIR/web/image.toml:402: `repository` has 103 tables, but at most 100 are allowed: remove the others"
    );
    let packages = |count: usize| (0..count).map(|i| format!("\"p{i}\",\n")).collect::<String>();
    assert_eq!(load(&format!("packages = [{}]", packages(10_000))).unwrap().packages.len(), 10_000);
    assert_eq!(
        load(&format!("packages = [{}]", packages(10_001))).unwrap_err(),
        "DIR/web/image.toml:10002: `packages` has 10001 entries, but at most 10000 are allowed: remove the others"
    );
    let inputs: String = (0..101)
        .map(|i| {
            std::fs::create_dir(top.path().join(format!("i{i}"))).unwrap();
            format!("\"../i{i}\", ")
        })
        .collect();
    let error = load(&format!("inputs = [{inputs}]")).unwrap_err();
    assert_eq!(
        error,
        "DIR/web/image.toml:2: `inputs` has 101 entries, but at most 100 are allowed: list a directory above them"
    );
}

#[test]
fn the_keys_of_all_repositories_have_a_limit() {
    let top = tree();
    let line = format!("{}\n", "A".repeat(63));
    let key = KEY.replace("ABCD\n", &line.repeat((1 << 20) / line.len() - 2));
    assert!(key.len() > 1_000_000 && key.len() <= 1 << 20, "{}", key.len());
    std::fs::write(top.path().join("web/k"), key).unwrap();
    assert_eq!(load(top.path(), &format!("{AMI}{}", repositories(16))).unwrap().repositories.len(), 16);
    let error = load(top.path(), &format!("{AMI}{}", repositories(17))).unwrap_err();
    assert_eq!(
        error,
        "DIR/web/image.toml:69: `key` of [[repository]] is \"k\", but the keys of all repositories of a definition, \
         or of all its parent definitions together, may have at most 16 MiB: export only the keys that the \
         repositories need"
    );
}

#[test]
fn package_files_have_a_limit_and_are_refused_before_they_are_read() {
    let top = tree();
    for dir in ["a", "b"] {
        std::fs::create_dir(top.path().join("web").join(dir)).unwrap();
        let file = std::fs::File::create(top.path().join("web").join(dir).join("huge.deb")).unwrap();
        file.set_len(9 << 30).unwrap();
    }
    let begin = Instant::now();
    let error = load(top.path(), &format!("{AMI}packages = [\"a/huge.deb\", \"b/huge.deb\"]\n")).unwrap_err();
    assert_eq!(
        error,
        "DIR/web/image.toml:2: `packages` names \"a/huge.deb\", but the package files of a definition, or of all its \
         parent definitions together, may have at most 8 GiB: install packages from a repository, or write them as \
         { url = \"…\", sha256 = \"…\" }"
    );
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

#[test]
fn a_package_file_is_read_once_however_it_is_spelt() {
    let top = tree();
    // Each spelling is a duplicate. Only the first reads the file, so the others cost only the look at the path.
    let metadata = [CONTROL, &format!("X: {}\n", "x".repeat(900 << 10))].concat();
    std::fs::write(top.path().join("web/large.deb"), fixture::deb(&metadata, ".gz")).unwrap();
    let spellings: String =
        (1..1500).map(|n| format!("\"{}large.deb\",\n", "./".repeat(n % 100 + 1))).collect();
    let error = load(top.path(), &format!("{AMI}packages = [{spellings}]")).unwrap_err();
    // 1500 times 900 KiB would exceed the limit for unpacked metadata.
    assert!(error.contains("has large twice (first on line 2): remove one"), "{error}");
    assert!(error.ends_with("and 1478 more") && !error.contains("at most"), "{error}");
}

const CONTROL: &str = "Package: large\nVersion: 1\nArchitecture: all\n";

#[test]
fn the_unpacked_metadata_of_all_package_files_has_a_limit() {
    let limits = |metadata| package::PackageLimits::new(1 << 30, metadata);
    let top = tree();
    let read = |name: &str, limits: &package::PackageLimits| {
        let file = std::fs::File::open(top.path().join("web").join(name)).unwrap();
        package::read_from(file, limits).map_err(|e| format!("{e:#}"))
    };
    let enough = limits(1 << 20);
    assert_eq!(read("site.deb", &enough).unwrap().name, "site");
    assert_eq!(enough.exceeded(), None);
    let one = limits(4 << 10);
    let count = (0..10).filter(|_| read("site.deb", &one).is_ok()).count();
    assert!((1..5).contains(&count), "{count}");
    assert_eq!(one.exceeded().unwrap(), "0 MiB of unpacked metadata");
}

#[test]
fn an_error_lists_few_mistakes_and_shortens_them() {
    let top = tree();
    let unknown: String = (0..100_000).map(|i| format!("k{i}=1\n")).collect();
    let error = load(top.path(), &format!("{AMI}{unknown}")).unwrap_err();
    assert!(error.starts_with("DIR/web/image.toml:2: unknown key `k0`"), "{error}");
    assert!(error.ends_with("\nand 99980 more") && error.lines().count() == 21, "{error}");
    // The error of each template lists some variables.
    std::fs::write(top.path().join("web/x"), "{{ missing }}").unwrap();
    let vars: String = (0..20_000).map(|i| format!("variable_{i}=\"\"\n")).collect();
    let file = |i| format!("[[file]]\nsource=\"x\"\ntarget=\"/x{i}\"\ntemplate=true\n");
    let files: String = (0..5).map(file).collect();
    let error = load(top.path(), &format!("{AMI}{files}[vars]\n{vars}")).unwrap_err();
    assert!(error.contains("`missing` is not defined") && error.contains("`variable_0`"), "{error}");
    assert!(error.len() < 5 * 1000 && error.ends_with("and 19980 more"), "{} {error}", error.len());
    // A long text of a definition is cut.
    let error =
        load(top.path(), &format!("{AMI}[[file]]\nsource=\"{}\"\n", "x".repeat(100_000))).unwrap_err();
    assert!(error.len() < 5 * 2500 && error.contains('…'), "{} {error:.9000}", error.len());
}

#[test]
fn many_secrets_are_read_quickly() {
    let top = tree();
    let names: String = (0..120_000).map(|i| format!("\"S{i:x}\",")).collect();
    let begin = Instant::now();
    let web =
        load(top.path(), &format!("{AMI}[[run]]\ncommand = [\"true\"]\nsecrets = [{names}]\n")).unwrap();
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    assert_eq!(web.runs[0].secrets.len(), 120_000);
}

/// The error must not depend on what is outside of the project.
#[test]
fn an_error_does_not_tell_what_exists_outside() {
    let top = tempfile::tempdir().unwrap();
    let at = |path: &str| top.path().join(path);
    for dir in ["repo/web", "outside/zz-dir", "outside/zz-def"] {
        std::fs::create_dir_all(at(dir)).unwrap();
    }
    std::fs::write(at("outside/zz-file"), "#!/bin/sh\n").unwrap();
    std::fs::write(at("outside/zz-def/image.toml"), AMI).unwrap();
    std::fs::write(at("repo/oven.toml"), "").unwrap();
    let outside = at("outside").display().to_string();
    let toml = |text: &str| std::fs::write(at("repo/web/image.toml"), text).unwrap();
    let plan = || {
        let order = BakeOrder::load(&[at("repo/web")]).map(|_| ());
        let error = order.and_then(|()| Settings::for_definition(&at("repo/web")).map(|_| ())).err();
        error.map_or(String::new(), |e| format!("{e:#} {}", hint_of(&e).unwrap_or_default()))
    };
    let keys = [
        "from = \"PATH\"",
        "from = \"PATH/../../repo/web\"",
        "inputs = [\"PATH\"]",
        "packages = [\"PATH\"]",
        "[[file]]\ntarget = \"/x\"\nsource = \"PATH\"",
        "[[file]]\ntarget = \"/x\"\ntemplate = true\nsource = \"PATH\"",
        "[[run]]\nscript = \"PATH\"",
        "[[ansible]]\nplaybook = \"PATH\"",
        "[[repository]]\nname = \"r\"\nurl = \"https://r.example\"\nkey = \"PATH\"",
    ];
    let spellings = [
        "../../outside/NAME".to_owned(),
        "./link".to_owned(),
        "./link/x".to_owned(),
        "../../outside/NAME/../x".to_owned(),
    ];
    for key in keys {
        for spelling in &spellings {
            let errors = ["zz-dir", "zz-file", "zz-def", "zz-gone", "zz-gone/deeper"].map(|name| {
                symlink(format!("{outside}/{name}"), at("repo/web/link")).unwrap();
                let key = key.replace("PATH", &spelling.replace("NAME", name));
                toml(&if key.starts_with("from") { key } else { format!("{AMI}{key}\n") });
                let error = plan();
                std::fs::remove_file(at("repo/web/link")).unwrap();
                error.replace(name, "NAME")
            });
            assert!(!errors[0].is_empty(), "{key} {spelling}");
            assert!(errors.iter().all(|error| *error == errors[0]), "{key} {spelling}: {errors:#?}");
        }
    }
    // image.toml and oven.toml as links.
    for name in ["image.toml", "oven.toml"] {
        toml(AMI);
        let errors = ["zz-dir", "zz-file", "zz-gone"].map(|target| {
            _ = std::fs::remove_file(at("repo/web").join(name));
            symlink(format!("{outside}/{target}"), at("repo/web").join(name)).unwrap();
            plan().replace(target, "NAME")
        });
        assert!(errors[0].contains("outside the project"), "{name}: {errors:#?}");
        assert!(errors.iter().all(|error| *error == errors[0]), "{name}: {errors:#?}");
        std::fs::remove_file(at("repo/web").join(name)).unwrap();
    }
}

#[test]
fn names_are_escaped_in_errors() {
    let top = tempfile::tempdir().unwrap();
    let dir = top.path().join("a\nerror: forged");
    std::fs::create_dir(&dir).unwrap();
    let write = |name: &str, text: &[u8]| std::fs::write(dir.join(name), text).unwrap();
    let assert_escaped = |error: anyhow::Error| {
        let text = format!("{error:#}\n{}", hint_of(&error).unwrap_or_default());
        assert!(text.contains("a\\nerror: forged"), "{text}");
        assert!(!text.contains("\nerror: forged"), "{text}");
    };
    let load = || Definition::load(&dir).unwrap_err();
    assert_escaped(load());
    assert_escaped(Definition::load(&dir.join("gone")).unwrap_err());
    assert_escaped(Definition::load(&dir.join("image.toml")).unwrap_err());
    for text in [
        "= 1".as_bytes(),
        b"\xff",
        b"from = 1\n",
        b"name = \"a\"\nfrom = \"./gone\nerror: forged/\"",
        b"name = \"a\"\nfrom = \"./gone/\"\n[tags]\n\"x\\nerror: forged\" = 1\n",
        b"name = \"a\"\nfrom = \"ami-01234567\"\n[[file]]\nsource = \"gone\"\ntarget = \"/x\"\n",
    ] {
        write("image.toml", text);
        assert_escaped(load());
    }
    for from in [".", "../../outside/"] {
        write("image.toml", format!("name = \"a\"\nfrom = \"{from}\"\n").as_bytes());
        assert_escaped(BakeOrder::load(&[&dir]).unwrap_err());
    }
    for text in ["[network]\nca_file = \"gone.pem\"", "x = 1", "="] {
        write("oven.toml", text.as_bytes());
        assert_escaped(Settings::for_definition(&dir).unwrap_err());
    }
}
