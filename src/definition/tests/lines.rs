//! Every mistake names its line: those that are found while the file is read, and those that a bake finds later.

use super::*;
use crate::error::Place;

const FROM: &str = "from = { name = \"debian-*\", owner = \"self\" }\n";

/// The lines that end with `# here`.
fn marked(toml: &str) -> Vec<usize> {
    toml.lines()
        .enumerate()
        .filter(|(_, line)| line.ends_with("# here"))
        .map(|(index, _)| index + 1)
        .collect()
}

/// Each text has as many mistakes as lines that are marked.
#[test]
fn a_mistake_of_the_file_is_on_its_line() {
    let top = tree();
    let cases = [
        "from = { name = \"\", owner = \"self\" } # here",
        "from = { name = \"a\", owner = \"me\" } # here\n[[file]]\nsource = \"setup.sh\"\ntarget = \"/x\"\nowner = \"www-data\"",
        "FROM[[file]]\nsource = \"setup.sh\"\ntarget = \"/x\"\nowner = \"a:b\" # here\ngroup = \"c d\" # here",
        "FROM[[file]]\nsource = \"setup.sh\"\ntarget = \"/x\"\n[[file]]\nsource = \"gone\" # here\ntarget = \"/x\" # here",
        "FROM[[file]] # here\ntarget = \"/x\"\n\n[[file]] # here\nsource = \"setup.sh\"",
        "FROM[[file]]\nsource = \"setup.sh\"\ntarget = \"/x\"\nafter = \"test\" # here\nmode = 644 # here",
        "FROM[[file]]\nsource = \"setup.sh\"\ntarget = \"/x\"\nafter = true # here\ntemplate = 1 # here",
        "FROMfile = [\n  { source = \"setup.sh\", target = \"/x\" },\n  { source = \"gone\", target = \"/y\" }, # here\n]",
        "FROMpackages = [\n  \"a\",\n  \"b c\", # here\n  \"a\", # here\n  { url = \"ftp://x/a.deb\", sha256 = \"0\" }, # here # here\n]",
        "FROMhold = [\"a\",\n  \"-y\"] # here\ndebconf = [\n  \"x\" # here\n]",
        "FROM[[repository]] # here\nname = \"a\"\nurl = \"x\" # here",
        "FROM[[repository]]\nname = \"a\"\nurl = \"https://x/\"\nsigned = false\n[[repository]]\nname = \"a\" # here\nurl = \"https://x/\"\nsigned = false\nsuite = \"..\" # here",
        "FROM[[repository]]\nname = \"a\"\nurl = \"https://x/\"\nsigned = false\npriority = 0 # here\n[[repository]]\nname = \"b\"\nurl = \"https://x/\"\nsigned = false\npriority = \"high\" # here",
        "FROM[[run]] # here\nnetwork = true\n[[run]]\nscript = \"setup.sh\"\ntimeout = 0 # here",
        "FROM[[run]]\ncommand = [\n  \"x\",\n  1, # here\n]\n[run.env]\nOVEN_X = \"1\" # here\nA = 1 # here",
        "FROM[[test]]\nscript = \"setup.sh\"\nbats = \"setup.sh\" # here\n[[ansible]] # here\ntags = [1] # here",
        "FROM[vars]\nPATH = \"a\" # here\nport = 80 # here\n[tags]\n\"oven:x\" = \"a\" # here",
        "FROM[disk]\ntype = \"gp2\"\niops = 4000 # here\nkms_key = \"alias/x\" # here",
        "FROM[disk] # here\ntype = \"io2\"\n[image]\nboot_mode = \"bios\" # here\n[clean]\nkeep = [\n  \"/a\",\n  \"b\", # here\n]",
        "FROMinputs = [\n  \"../common\",\n  \"../gone\", # here\n  \"../common\", # here\n]\nzzz = 1 # here",
    ];
    for case in cases {
        let toml = case.replace("FROM", FROM);
        let error = load(top.path(), &toml).unwrap_err();
        let lines = error.lines().map(|line| {
            let rest =
                line.strip_prefix("DIR/web/image.toml:").unwrap_or_else(|| panic!("{toml}\ngives {error}"));
            rest.split(':').next().unwrap().parse::<usize>().unwrap()
        });
        // A line may have two mistakes.
        let twice = |line: &usize| toml.lines().nth(line - 1).unwrap().matches("# here").count();
        let expected = marked(&toml).into_iter().flat_map(|line| std::iter::repeat_n(line, twice(&line)));
        assert_eq!(lines.collect::<Vec<_>>(), expected.collect::<Vec<_>>(), "{toml}\ngives {error}");
    }
}

/// Mistakes that are found only in a bake. Several keys exist in more than one table.
#[test]
fn a_mistake_of_a_bake_is_on_its_line() {
    let top = tree();
    let digest = "0123456789abcdef".repeat(4);
    let toml = format!(
        "{FROM}name = \"web\" # name
network = true
packages = [ # packages
  \"jq\", # jq
  \"owner=1.2\", # owner
  \"libc6:i386\", # libc6
  \"./site.deb\", # site
  {{ url = \"https://x.example/a.deb\", sha256 = \"{digest}\" }}, # url
  \"@web\", # group
]
hold = [
  \"jq\",
  \"tree\", # tree
]

[[repository]]
name = \"web\"
url = \"https://x.example/\"
signed = false # repository 0

[[repository]]
name = \"docker\"
url = \"https://docker.example/\"
suite = \"web\"
signed = false # repository 1

[[file]] # file 0
source = \"setup.sh\"
target = \"/etc/a\"

[[run]]
command = [\"a\"]
secrets = [
  \"A\",
  \"B\", # B
]

[[file]]
source = \"setup.sh\" # source 1
target = \"/etc/b\" # target 1
group = \"app\" # group 1
owner = \"app\" # owner 1

[[run]]
command = [\"a\"]
secrets = [\"B\"] # second B

[[ansible]]
playbook = \"setup.sh\" # playbook
network = true

[[test]]
bats = \"setup.sh\" # bats

[disk]
size_gib = 8 # size
type = \"gp3\"

[image]
imds = \"v2.0\" # imds
tpm = \"v2.0\" # tpm
"
    );
    let web = load(top.path(), &toml).unwrap();
    let cases = [
        ("name", web.place("name", None)),
        ("packages", web.place_of_package(None)),
        ("packages", web.place_of_package(Some("another"))),
        ("jq", web.place_of_package(Some("jq"))),
        ("owner", web.place_of_package(Some("owner"))),
        ("libc6", web.place_of_package(Some("libc6"))),
        ("libc6", web.place_of_package(Some("libc6:i386"))),
        ("site", web.place_of_package(Some("site"))),
        ("url", web.place_of_package(Some("https://x.example/a.deb"))),
        ("group", web.place_of_package(Some("@web"))),
        ("tree", web.place_of_package(Some("tree"))),
        ("repository 0", web.place("repository[0].signed", None)),
        ("repository 1", web.place("repository[1].signed", None)),
        // A key that is not set: the line of its table.
        ("file 0", web.place_of_file(&web.files[0], "owner")),
        ("file 0", web.place_of_file(&web.files[0], "group")),
        ("source 1", web.place_of_file(&web.files[1], "source")),
        ("target 1", web.place_of_file(&web.files[1], "target")),
        ("owner 1", web.place_of_file(&web.files[1], "owner")),
        ("group 1", web.place_of_file(&web.files[1], "group")),
        ("B", web.place_of_script(&web.runs[0], "secrets", Some("B"))),
        ("second B", web.place_of_script(&web.runs[1], "secrets", Some("B"))),
        ("playbook", web.place_of_script(&web.runs[2], "playbook", None)),
        ("bats", web.place_of_script(&web.tests[0], "bats", None)),
        ("size", web.place("disk.size_gib", None)),
        ("imds", web.place("image.imds", None)),
        ("tpm", web.place("image.tpm", None)),
    ];
    for (mark, place) in cases {
        let ending = format!("# {mark}");
        let line = toml.lines().position(|line| line.ends_with(&ending)).expect(mark) + 1;
        let start = format!("{}/web/image.toml:{line}: `", top.path().display());
        assert!(place.to_string().starts_with(&start), "{mark}: {place} is not on line {line}");
    }
    let label = |place: Place| place.to_string().rsplit(": ").next().unwrap().to_owned();
    assert_eq!(label(web.place_of_file(&web.files[1], "owner")), "`owner` of [[file]]");
    assert_eq!(label(web.place("disk.size_gib", None)), "`size_gib` of [disk]");
    assert_eq!(label(web.place_of_package(Some("jq"))), "`packages`");
}

#[test]
fn a_file_can_be_placed_after_the_scripts() {
    let top = tree();
    for (after, expected) in [("", false), ("after = \"packages\"", false), ("after = \"run\"", true)] {
        let toml = format!("{FROM}[[file]]\nsource = \"setup.sh\"\ntarget = \"/x\"\n{after}\n");
        assert_eq!(load(top.path(), &toml).unwrap().files[0].after_run, expected, "{after}");
    }
}

/// Whether a line has the key, or is in the value of the key that begins above it.
fn is_on_line(toml: &str, line: usize, key: &str) -> bool {
    let names = |text: &str| {
        [format!("{key} ="), format!("\"{key}\" ="), format!("[{key}]")]
            .iter()
            .any(|name| text.contains(name))
    };
    for text in toml.lines().take(line).collect::<Vec<_>>().into_iter().rev() {
        if names(text) {
            return true;
        }
        // A line within an array begins with an element or with the bracket.
        if !text.trim_start().starts_with(['"', '{', ']', '1']) {
            return false;
        }
    }
    false
}

/// The table of mistakes of the reference: each error is on the line of the key that it names.
#[test]
fn every_mistake_of_the_table_is_on_the_line_of_its_key() {
    let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/definitions/mistakes.toml"));
    let table: toml::Table = text.parse().unwrap();
    let (top, mut checked, mut wrong) = (tree(), 0, Vec::new());
    for toml in ["schema", "parser"].iter().flat_map(|word| table[*word].as_array().unwrap()) {
        let toml = toml.as_str().unwrap();
        let Err(error) = load(top.path(), toml) else { continue };
        for line in error.lines() {
            let Some((number, what)) =
                line.strip_prefix("DIR/web/image.toml:").and_then(|rest| rest.split_once(": "))
            else {
                continue;
            };
            let (number, lines) = (number.parse::<usize>().unwrap(), toml.lines().collect::<Vec<_>>());
            let key = what.strip_prefix("unknown key ").unwrap_or(what);
            let key = key.strip_prefix('`').and_then(|rest| rest.split('`').next()).unwrap_or_default();
            if what.contains(" is missing: ") {
                // The line is that of its table: a header, an inline table, or the beginning of the file.
                let text = lines.get(number - 1).copied().unwrap_or_default();
                wrong.extend(
                    (number != 1 && !text.contains(['[', '{'])).then(|| format!("{toml}\ngives {line}")),
                );
            } else if !key.is_empty() && !key.contains('\\') {
                wrong.extend((!is_on_line(toml, number, key)).then(|| format!("{toml}\ngives {line}")));
            } else {
                continue;
            }
            checked += 1;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(checked > 150, "{checked}");
}
