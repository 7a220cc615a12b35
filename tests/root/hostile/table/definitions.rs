//! The hostile definitions: what is in the directory of each, and how its bake has to end.

use super::disk::{hole, sh, write};
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;

/// A hostile definition.
pub struct DefinitionCase {
    pub name: &'static str,
    /// Fills the directory of the definition. The project is the directory above it.
    pub make: fn(&Path),
    pub code: i32,
    pub words: &'static [&'static str],
}

const FROM: &str = "from = { name = \"base\" }\n";

/// Writes image.toml: the base, and this.
fn toml(dir: &Path, more: &str) {
    write(dir, "image.toml", format!("{FROM}{more}"));
}

/// A file of the definition, which is placed in the image.
fn file(dir: &Path, name: &str, more: &str) {
    toml(dir, &format!("[[file]]\nsource = \"{name}\"\ntarget = \"/srv/x\"\n{more}\n"));
}

const fn case(
    name: &'static str,
    code: i32,
    words: &'static [&'static str],
    make: fn(&Path),
) -> DefinitionCase {
    DefinitionCase { name, make, code, words }
}

pub fn all() -> Vec<DefinitionCase> {
    let mut all = texts();
    all.extend(values());
    all.extend(sources());
    all.extend(graphs());
    all.extend(steps());
    all
}

/// Texts that are no definition.
fn texts() -> Vec<DefinitionCase> {
    vec![
        case("a value nested 100,000 times", 3, &["image.toml:"], |dir| {
            toml(dir, &format!("packages = {}{}\n", "[".repeat(100_000), "]".repeat(100_000)));
        }),
        case("tables nested 50,000 times", 3, &["image.toml:"], |dir| {
            toml(dir, &format!("[{}]\n", vec!["a"; 50_000].join(".")));
        }),
        case("a file of 10 MiB", 3, &["image.toml"], |dir| toml(dir, &"#".repeat(10 << 20))),
        case("50,000 keys", 3, &["image.toml:", "more"], |dir| {
            toml(dir, &(0..50_000).map(|n| format!("k{n}=1\n")).collect::<String>());
        }),
        case("an integer of 1000 digits", 3, &["image.toml:3", "size_gib"], |dir| {
            toml(dir, &format!("[disk]\nsize_gib = {}\n", "9".repeat(1000)));
        }),
        case("a NUL", 3, &["image.toml:2"], |dir| toml(dir, "description = \"a\0b\"\n")),
        case("bytes that are not UTF-8", 3, &["image.toml:2", "UTF-8"], |dir| {
            write(dir, "image.toml", [FROM.as_bytes(), b"description = \"\xff\"\n"].concat());
        }),
        case("a byte order mark", 0, &[], |dir| write(dir, "image.toml", format!("\u{feff}{FROM}"))),
        case("lines that end with CR and LF", 0, &[], |dir| {
            toml(dir, "[[run]]\r\ncommand = [\"/bin/true\"]\r\n");
        }),
        case("image.toml is a FIFO", 3, &["image.toml"], |dir| {
            sh(&format!("mkfifo {}/image.toml", dir.display()))
        }),
        case("image.toml is a directory", 3, &["image.toml"], |dir| {
            fs::create_dir(dir.join("image.toml")).unwrap()
        }),
        case("image.toml leads to /etc/shadow", 3, &["image.toml"], |dir| {
            symlink("/etc/shadow", dir.join("image.toml")).unwrap();
        }),
        case("image.toml leads to /dev/zero", 3, &["image.toml"], |dir| {
            symlink("/dev/zero", dir.join("image.toml")).unwrap();
        }),
    ]
}

/// Values that a key does not accept.
fn values() -> Vec<DefinitionCase> {
    vec![
        case("a package that is an option", 3, &["image.toml:2", "packages"], |dir| {
            toml(dir, "packages = [\"-oDpkg::Pre-Install-Pkgs::=touch /x\"]\n");
        }),
        case("a package of shell text", 3, &["image.toml:2", "packages"], |dir| {
            toml(dir, "packages = [\"hello; touch /x\"]\n");
        }),
        case("a repository's URL with a newline", 3, &["image.toml:4", "url"], |dir| {
            toml(
                dir,
                "[[repository]]\nname = \"x\"\nurl = \"http://a.example/\\ndeb [trusted=yes] http://b.example/ x main\"\nsigned = false\nsuite = \"x\"\ncomponents = [\"main\"]\n",
            );
        }),
        case("a repository's URL of shell text", 3, &["image.toml:4", "url"], |dir| {
            toml(
                dir,
                "[[repository]]\nname = \"x\"\nurl = \"http://$(touch /x)/ `id`\"\nsigned = false\nsuite = \"x\"\ncomponents = [\"main\"]\n",
            );
        }),
        case("a repository's key that is no key", 3, &["image.toml:5", "key"], |dir| {
            write(dir, "key.asc", vec![0x55; 4096]);
            toml(
                dir,
                "[[repository]]\nname = \"x\"\nurl = \"http://a.example/\"\nkey = \"key.asc\"\nsuite = \"x\"\ncomponents = [\"main\"]\n",
            );
        }),
        case("a name with control characters", 3, &["image.toml:2", "name"], |dir| {
            toml(dir, "name = \"\\u001b[31mred\\nerror: forged\"\n");
        }),
        case("a target above the root", 3, &["image.toml:4", "target"], |dir| {
            write(dir, "f", "x");
            toml(dir, "[[file]]\nsource = \"f\"\ntarget = \"/srv/../../../etc/cron.d/x\"\n");
        }),
        case("a time limit of 0", 3, &["image.toml:4", "timeout"], |dir| {
            toml(dir, "[[run]]\ncommand = [\"true\"]\ntimeout = 0\n");
        }),
        case("a time limit of 10^18 seconds", 3, &["image.toml:4", "timeout"], |dir| {
            toml(dir, "[[run]]\ncommand = [\"true\"]\ntimeout = 1000000000000000000\n");
        }),
        case("a thousand million retries", 3, &["image.toml:4", "retries"], |dir| {
            toml(dir, "[[run]]\ncommand = [\"true\"]\nretries = 1000000000\n");
        }),
        case("a command with a NUL", 3, &["image.toml:3", "command"], |dir| {
            toml(dir, "[[run]]\ncommand = [\"true\", \"a\\u0000b\"]\n");
        }),
        case("a variable that replaces PATH", 3, &["PATH"], |dir| toml(dir, "[vars]\nPATH = \"/tmp\"\n")),
        case("an ami's id that is a path", 3, &["image.toml"], |dir| {
            write(dir, "image.toml", "from = { id = \"ami-../../../../etc/passwd\" }\n");
        }),
    ]
}

/// Files of the definition.
fn sources() -> Vec<DefinitionCase> {
    vec![
        case("a source that leads to /etc/shadow", 3, &["image.toml:3"], |dir| {
            symlink("/etc/shadow", dir.join("f")).unwrap();
            file(dir, "f", "");
        }),
        case("a source that leads to itself", 3, &["image.toml:3"], |dir| {
            symlink("f", dir.join("f")).unwrap();
            file(dir, "f", "");
        }),
        case("a source above the project", 3, &["image.toml:3"], |dir| {
            file(dir, "../../../../../etc/passwd", "")
        }),
        case("a source that is a FIFO", 3, &["image"], |dir| {
            sh(&format!("mkfifo {}/f", dir.display()));
            file(dir, "f", "");
        }),
        case("a source that is a socket", 3, &["image"], |dir| {
            drop(UnixListener::bind(dir.join("f")).unwrap());
            file(dir, "f", "");
        }),
        case("a source that is a directory", 3, &["image.toml:3"], |dir| {
            fs::create_dir(dir.join("f")).unwrap();
            file(dir, "f", "");
        }),
        case("a source that is larger than the disk", 5, &["size_gib"], |dir| {
            hole(dir, "f", 64 << 20);
            file(dir, "f", "");
        }),
        case("a source with a newline in its name", 3, &["image.toml:3"], |dir| {
            write(dir, "a\nerror: forged", "x");
            file(dir, "a\\nerror: forged", "");
        }),
        case("files whose names are not shown as they are", 0, &[], |dir| {
            write(dir, "a\nerror: forged\u{202e}\x1b[31m", "x");
            toml(dir, "");
        }),
        case("a template that names itself", 3, &["f"], |dir| {
            write(dir, "f", "{% include 'f' %}\n");
            file(dir, "f", "template = true");
        }),
        case("a template that never ends", 3, &["f", "too long"], |dir| {
            write(
                dir,
                "f",
                "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}{% endfor %}",
            );
            file(dir, "f", "template = true");
        }),
        case("variables that name each other", 3, &["f"], |dir| {
            write(dir, "f", "{{ a }}{{ nobody }}\n");
            file(dir, "f", "template = true\n[vars]\na = \"{{ b }}\"\nb = \"{{ a }}\"");
        }),
        case("a script without a first line", 3, &["image.toml:3"], |dir| {
            write(dir, "f", vec![0; 4096]);
            toml(dir, "[[run]]\nscript = \"f\"\n");
        }),
    ]
}

/// Definitions that refer to others.
fn graphs() -> Vec<DefinitionCase> {
    vec![
        case("a parent that is the definition itself", 3, &["image.toml"], |dir| {
            write(dir, "image.toml", "from = \"../image\"\n");
        }),
        case("parents in a circle", 3, &["image.toml"], |dir| {
            write(dir, "image.toml", "from = \"../other\"\n");
            write(dir.parent().unwrap(), "other/image.toml", "from = \"../image\"\n");
        }),
        case("inputs that contain the region", 3, &["is inside the directory"], |dir| {
            toml(dir, "inputs = [\"..\"]\n")
        }),
        case("inputs that lead to each other", 0, &[], |dir| {
            let common = dir.parent().unwrap().join("common");
            write(&common, "x", "x");
            symlink("../image", common.join("image")).unwrap();
            symlink("../common", dir.join("common")).unwrap();
            toml(dir, "inputs = [\"../common\"]\n");
        }),
        case("inputs outside the project", 3, &["image.toml:2", "inputs"], |dir| {
            toml(dir, "inputs = [\"../../../../etc\"]\n")
        }),
        case("a directory that leads to itself", 0, &[], |dir| {
            toml(dir, "");
            symlink(".", dir.join("loop")).unwrap();
        }),
        case("paths to keep that match everything", 0, &[], |dir| {
            toml(
                dir,
                &format!("[clean]\nkeep = [\"{}\"]\n[[run]]\ncommand = [\"/bin/true\"]\n", "/*".repeat(500)),
            );
        }),
    ]
}

fn steps() -> Vec<DefinitionCase> {
    vec![
        case("an argument of 200 KiB", 5, &["image.toml:2"], |dir| {
            toml(dir, &format!("[[run]]\ncommand = [\"true\", \"{}\"]\n", "a".repeat(200 << 10)));
        }),
        case("an argument of 2 MiB", 3, &["image.toml"], |dir| {
            toml(dir, &format!("[[run]]\ncommand = [\"true\", \"{}\"]\n", "a".repeat(2 << 20)));
        }),
        case("10,000 variables of the environment", 0, &[], |dir| {
            let all = (0..10_000).map(|n| format!("V{n} = \"{}\"\n", "a".repeat(64))).collect::<String>();
            toml(dir, &format!("[[run]]\ncommand = [\"true\"]\n[run.env]\n{all}"));
        }),
        case("a program that is not in the image", 5, &["image.toml:2", "not found"], |dir| {
            toml(dir, "[[run]]\ncommand = [\"/nowhere\"]\n");
        }),
        case("a secret that is not set", 3, &["TABLE_NONE"], |dir| {
            toml(dir, "[[run]]\ncommand = [\"true\"]\nsecrets = [\"TABLE_NONE\"]\n");
        }),
    ]
}
