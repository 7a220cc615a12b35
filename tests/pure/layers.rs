//! The floor plan: a room of `src` imports only from rooms below it, and no two modules import each other.
//!
//! A room is a directory or a file directly in `src`. The sources are read as text: their `use` trees, and the paths
//! in them that begin with `crate::` or `super::` or with a module of their own. Test code inside of `src` is held to
//! the floors, too; only cycles are looked for without it.
//!
//! A function takes few parameters, too: in all of the repository's Rust.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// From the ground up. `src/lib.rs` lists the rooms in the same order.
const FLOORS: &[&str] = &[
    "error",
    "text",
    "ids",
    "device",
    "secrets",
    "trace",
    "sys",
    "formats",
    "image",
    "owner",
    "undo",
    "report",
    "config",
    "cloud",
    "definition",
    "identity",
    "transfer",
    "sandbox",
    "disk",
    "mount",
    "provision",
    "seal",
    "distros",
    "doctor",
    "site",
    "bake",
    "cli",
];

/// More files side by side are hard to survey.
const MAX_FILES: usize = 16;

/// Besides `self`. Clippy counts `self`, so its threshold is higher (clippy.toml).
const MAX_PARAMETERS: usize = 5;

type ModulePath = Vec<String>;

/// A source file, as a module.
struct Module {
    path: ModulePath,
    file: PathBuf,
    /// Without comments and literals; as long as the file, so that offsets agree.
    code: String,
}

/// A path that a module names, from the crate's root.
struct Import {
    to: ModulePath,
    line: usize,
    in_test: bool,
}

#[test]
fn rooms_import_from_below_only() {
    let sources = Sources::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let floor = |room: &str| FLOORS.iter().position(|known| *known == room);
    let declared = sources.rooms_of_lib();
    let order: Vec<&str> = declared.iter().map(|(room, _)| room.as_str()).collect();
    assert_eq!(order, FLOORS, "src/lib.rs lists the rooms in the order of the floors");
    let line_of = |room: &str| declared.iter().find(|(known, _)| known == room).map_or(0, |(_, line)| *line);
    let mut wrong = Vec::new();
    for module in &sources.modules {
        let room = &module.path[0];
        let own = floor(room).unwrap_or_else(|| panic!("{}: `{room}` has no floor", module.file.display()));
        for import in sources.imports(module) {
            let Some(other) = import.to.first().and_then(|room| floor(room)) else { continue };
            if other > own {
                let (file, to, above) = (module.file.display(), import.to.join("::"), FLOORS[other]);
                wrong.push(format!(
                    "{file}:{}: {to}: `{above}` is above `{room}` (src/lib.rs:{} and src/lib.rs:{})",
                    import.line,
                    line_of(above),
                    line_of(room),
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "a room imports from a room above it:\n{}", wrong.join("\n"));
}

/// What a module imports from the module that it is inside of does not count: a room's `mod.rs` may have the types that
/// its files share.
#[test]
fn no_two_modules_import_each_other() {
    let sources = Sources::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let mut graph: BTreeMap<ModulePath, BTreeMap<ModulePath, usize>> = BTreeMap::new();
    for module in sources.modules.iter().filter(|module| !module.is_test()) {
        for import in sources.imports(module).filter(|import| !import.in_test) {
            if let Some(to) = sources.module_of(&import.to)
                && !module.path.starts_with(&to.path)
            {
                graph.entry(module.path.clone()).or_default().entry(to.path.clone()).or_insert(import.line);
            }
        }
    }
    if let Some(cycle) = find_cycle(&graph) {
        let names: Vec<_> = cycle
            .windows(2)
            .map(|pair| {
                let file = &sources.modules.iter().find(|module| module.path == pair[0]).unwrap().file;
                format!("{}:{}: imports {}", file.display(), graph[&pair[0]][&pair[1]], pair[1].join("::"))
            })
            .collect();
        panic!("modules import each other:\n{}", names.join("\n"));
    }
}

#[test]
fn directories_are_not_crowded() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files: BTreeMap<PathBuf, usize> = BTreeMap::new();
    for file in rust_files(&root.join("src")) {
        *files.entry(file.parent().unwrap().to_owned()).or_default() += 1;
    }
    files.retain(|_, count| *count > MAX_FILES);
    assert!(files.is_empty(), "more than {MAX_FILES} files side by side: {files:?}");
}

/// Traits of other crates are implemented as they are declared.
#[test]
fn functions_take_few_parameters() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = ["src", "tests", "tools", "plugins"].into_iter().flat_map(|dir| rust_files(&root.join(dir)));
    let read = |file: PathBuf| {
        let code = without_comments_and_literals(&std::fs::read_to_string(&file).unwrap());
        (file, code)
    };
    let sources: Vec<(PathBuf, String)> = files.map(read).collect();
    let own: BTreeSet<&str> = sources.iter().flat_map(|(_, code)| traits(code)).collect();
    let (mut count, mut wrong) = (0, Vec::new());
    for (file, code) in &sources {
        for function in functions(code) {
            count += 1;
            let is_own = function.of_trait.as_deref().is_none_or(|name| own.contains(name));
            if function.parameters > MAX_PARAMETERS && is_own {
                let file = file.strip_prefix(root).unwrap().display();
                let Function { name, line, parameters, .. } = function;
                wrong.push(format!("{file}:{line}: {name} has {parameters}"));
            }
        }
    }
    assert!(count > 3000, "only {count} functions were found");
    assert!(wrong.is_empty(), "more than {MAX_PARAMETERS} parameters:\n{}", wrong.join("\n"));
}

#[test]
fn parameters_are_counted() {
    let code = "\
        pub async fn six<'a, F: Fn(u8, u8) -> u8>(\n    a: &'a u8,\n    b: [u8; 2],\n    (c, d): (u8, u8),\n    \
        e: BTreeMap<u8, Vec<u8>>,\n    f: impl Fn(u8, u8) -> u8,\n    g: F,\n) -> impl Fn(u8, u8) {\n}\n\
        trait Own {\n    fn none();\n}\nimpl<T: From<u8>> Own for X<T> {\n    fn five(&'a mut self, \
        a: u8, b: u8, c: u8, d: u8, e: u8) {\n        fn one(a: fn(u8, u8)) {}\n    }\n}\n\
        impl other::Far<u8> for X {\n    fn two(self: Box<Self>, a: u8, b: u8) {\n        fn inner() {}\n    }\n}\n";
    let found: Vec<_> = functions(code)
        .into_iter()
        .map(|function| (function.name, function.line, function.parameters, function.of_trait))
        .collect();
    let function = |name: &str, line, parameters, of_trait: Option<&str>| {
        (name.to_owned(), line, parameters, of_trait.map(str::to_owned))
    };
    let expected = [
        function("six", 1, 6, None),
        function("none", 11, 0, None),
        function("five", 14, 5, Some("Own")),
        function("one", 15, 1, None),
        function("two", 19, 2, Some("Far")),
        function("inner", 20, 0, None),
    ];
    assert_eq!(found, expected);
    assert_eq!(traits(code), ["Own"]);
}

/// The check itself, on sources that break the rule in each way that it reads.
#[test]
fn forbidden_imports_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let write = |file: &str, text: &str| {
        let path = dir.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("lib.rs", "pub mod cloud;\npub mod bake;\n");
    write(
        "cloud/mod.rs",
        "// use crate::bake::no;\nmod a;\nuse crate::{\n    error,\n    bake::{options::X, Y},\n};\n\
         const TEXT: &str = \"crate::bake::no\";\nfn f() { crate::bake::z() }\n",
    );
    write("cloud/a.rs", "mod inner {\n    use super::super::super::bake::W;\n}\nuse super::b;\n");
    write("cloud/b.rs", "use super::a;\n");
    write("bake/mod.rs", "use crate::cloud;\n");
    let sources = Sources::read(dir.path());
    let imports = |path: &[&str]| -> Vec<(String, usize)> {
        let module = sources.modules.iter().find(|module| module.path == path).unwrap();
        sources.imports(module).map(|import| (import.to.join("::"), import.line)).collect()
    };
    let cloud = imports(&["cloud"]);
    for expected in [("error", 3), ("bake::options::X", 3), ("bake::Y", 3), ("bake::z", 8)] {
        assert!(cloud.contains(&(expected.0.to_owned(), expected.1)), "{expected:?} in {cloud:?}");
    }
    assert!(!cloud.iter().any(|(to, _)| to.ends_with("no")), "{cloud:?}");
    assert!(imports(&["cloud", "a"]).contains(&("bake::W".to_owned(), 2)));
    assert_eq!(sources.rooms_of_lib(), [("cloud".to_owned(), 1), ("bake".to_owned(), 2)]);
    let edge =
        |to: &[&str]| BTreeMap::from([(to.iter().map(|s| (*s).to_owned()).collect::<ModulePath>(), 1)]);
    let graph = BTreeMap::from([
        (vec!["cloud".to_owned(), "a".to_owned()], edge(&["cloud", "b"])),
        (vec!["cloud".to_owned(), "b".to_owned()], edge(&["cloud", "a"])),
    ]);
    assert_eq!(find_cycle(&graph).unwrap().len(), 3);
}

struct Sources {
    modules: Vec<Module>,
    lib: String,
}

impl Module {
    /// Tests, and the servers and trees that they use.
    fn is_test(&self) -> bool {
        self.path.iter().any(|name| ["tests", "test", "fake"].contains(&name.as_str()))
    }
}

impl Sources {
    /// `src` holds the crate's sources. `main.rs` is above all rooms and not read.
    fn read(src: &Path) -> Self {
        let mut modules = Vec::new();
        let mut lib = String::new();
        for file in rust_files(src) {
            let text = std::fs::read_to_string(&file).unwrap();
            let relative = file.strip_prefix(src).unwrap();
            let mut path: ModulePath =
                relative.with_extension("").iter().map(|name| name.to_str().unwrap().to_owned()).collect();
            match path.last().map(String::as_str) {
                Some("lib") => lib = text,
                Some("main") => {}
                last => {
                    if last == Some("mod") {
                        path.pop();
                    }
                    let file = Path::new("src").join(relative);
                    modules.push(Module { path, file, code: without_comments_and_literals(&text) });
                }
            }
        }
        Self { modules, lib }
    }

    /// The rooms that `lib.rs` declares, with their lines.
    fn rooms_of_lib(&self) -> Vec<(String, usize)> {
        let lines = self.lib.lines().zip(1..);
        let room = |(line, number): (&str, usize)| {
            let name = line.split("//").next()?.trim().strip_prefix("pub mod ")?.strip_suffix(';')?;
            Some((name.to_owned(), number))
        };
        lines.filter_map(room).collect()
    }

    /// The module that has an item.
    fn module_of(&self, item: &[String]) -> Option<&Module> {
        let inside = self.modules.iter().filter(|module| item.starts_with(&module.path));
        inside.max_by_key(|module| module.path.len())
    }

    fn imports<'s>(&'s self, module: &'s Module) -> impl Iterator<Item = Import> + 's {
        let blocks = inline_modules(&module.code);
        let found = use_trees(&module.code).into_iter().chain(inline_paths(&module.code));
        found.filter_map(move |(offset, segments)| {
            let mut scope = module.path.clone();
            let around = blocks.iter().filter(|block| block.start < offset && offset < block.end);
            scope.extend(around.map(|block| block.name.clone()));
            let in_test = scope[module.path.len()..].iter().any(|name| name == "tests");
            let line = module.code[..offset].matches('\n').count() + 1;
            let to = self.resolve(&segments, &scope)?;
            Some(Import { to, line, in_test })
        })
    }

    /// From the crate's root; `None` for what is no path of this crate.
    fn resolve(&self, segments: &[String], scope: &[String]) -> Option<ModulePath> {
        let first = segments.first()?.as_str();
        if first == "crate" {
            return Some(segments[1..].to_vec());
        }
        let ups = segments.iter().take_while(|segment| *segment == "super").count();
        if ups > 0 || first == "self" {
            let rest = segments.iter().skip_while(|segment| ["super", "self"].contains(&segment.as_str()));
            let base = scope[..scope.len().checked_sub(ups)?].iter();
            return Some(base.chain(rest).cloned().collect());
        }
        let child: ModulePath = scope.iter().chain(segments.first()).cloned().collect();
        let is_child = self.modules.iter().any(|module| module.path.starts_with(&child));
        is_child.then(|| scope.iter().chain(segments).cloned().collect())
    }
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Comments, strings and characters become blanks; lines stay.
fn without_comments_and_literals(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = literal_end(bytes, at).unwrap_or(at);
        if end > at {
            out[at..end].iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
            at = end;
        } else {
            at += 1;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Where the comment or literal that begins here ends; `None` if none does.
fn literal_end(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = &bytes[at..];
    let find = |needle: &[u8], from: usize| {
        let found = bytes[from..].windows(needle.len()).position(|window| window == needle);
        found.map_or(bytes.len(), |found| from + found + needle.len())
    };
    if rest.starts_with(b"//") {
        return Some(bytes[at..].iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |end| at + end));
    }
    if rest.starts_with(b"/*") {
        return Some(find(b"*/", at + 2));
    }
    let word_before = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
    if !word_before && (rest.starts_with(b"r\"") || rest.starts_with(b"r#") || rest.starts_with(b"br")) {
        let letters = if rest[0] == b'b' { 2 } else { 1 };
        let hashes = rest[letters..].iter().take_while(|byte| **byte == b'#').count();
        if rest.get(letters + hashes) == Some(&b'"') {
            let end = [b"\"".as_slice(), &vec![b'#'; hashes]].concat();
            return Some(find(&end, at + letters + hashes + 1));
        }
    }
    if rest[0] == b'"' {
        let mut end = at + 1;
        while end < bytes.len() && bytes[end] != b'"' {
            end += if bytes[end] == b'\\' { 2 } else { 1 };
        }
        return Some((end + 1).min(bytes.len()));
    }
    if rest[0] == b'\'' {
        // A lifetime has no second quote.
        let text = std::str::from_utf8(rest).ok()?;
        let mut chars = text.char_indices().skip(1);
        let (_, first) = chars.next()?;
        if first == '\\' {
            let close = text[2..].char_indices().skip(1).find(|(_, c)| *c == '\'')?;
            return Some(at + 2 + close.0 + 1);
        }
        let (close, quote) = chars.next()?;
        return (quote == '\'').then_some(at + close + 1);
    }
    None
}

/// A block in braces: a module, or the implementation of a trait.
struct Block {
    name: String,
    start: usize,
    end: usize,
}

/// Where the brace at `start` is closed.
fn closing_brace(code: &str, start: usize) -> usize {
    let mut depth = 0;
    let end = code[start..].char_indices().find_map(|(offset, c)| {
        depth += match c {
            '{' => 1,
            '}' => -1,
            _ => 0,
        };
        (depth == 0).then_some(start + offset)
    });
    end.unwrap_or(code.len())
}

/// Whether a word begins at `at`.
fn begins_word(code: &str, at: usize) -> bool {
    !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_')
}

/// The name that a text begins with; empty if it does not begin with one.
fn leading_name(text: &str) -> &str {
    &text[..text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len())]
}

/// `mod name { … }`
fn inline_modules(code: &str) -> Vec<Block> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("mod ") {
        let rest = &code[at + 4..];
        let name = leading_name(rest);
        let after = rest[name.len()..].trim_start();
        if !begins_word(code, at) || name.is_empty() || !after.starts_with('{') {
            continue;
        }
        let start = code.len() - after.len();
        found.push(Block { name: name.to_owned(), start, end: closing_brace(code, start) });
    }
    found
}

struct Function {
    name: String,
    line: usize,
    /// Without `self`.
    parameters: usize,
    /// The trait that it implements.
    of_trait: Option<String>,
}

/// All functions with a name.
fn functions(code: &str) -> Vec<Function> {
    let implementations = trait_implementations(code);
    let mut found = Vec::new();
    for (at, _) in code.match_indices("fn ").filter(|(at, _)| begins_word(code, *at)) {
        let name = leading_name(&code[at + 3..]);
        let mut rest = &code[at + 3 + name.len()..];
        if let Some(generics) = rest.strip_prefix('<') {
            rest = list_items(generics).1;
        }
        let (false, Some(list)) = (name.is_empty(), rest.strip_prefix('(')) else { continue };
        let of_trait = implementations.iter().find(|block| {
            let count = |brace| code[block.start..at].matches(brace).count();
            block.start < at && at < block.end && count('{') == count('}') + 1
        });
        found.push(Function {
            name: name.to_owned(),
            line: code[..at].matches('\n').count() + 1,
            parameters: list_items(list).0.into_iter().filter(|item| !is_receiver(item)).count(),
            of_trait: of_trait.map(|block| block.name.clone()),
        });
    }
    found
}

/// The names of the traits that the code declares.
fn traits(code: &str) -> Vec<&str> {
    let found = code.match_indices("trait ").filter(|(at, _)| begins_word(code, *at));
    found.map(|(at, keyword)| leading_name(&code[at + keyword.len()..])).collect()
}

/// `impl name for … { … }`
fn trait_implementations(code: &str) -> Vec<Block> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("impl") {
        let (mut head, Some(open)) = (&code[at + 4..], code[at..].find('{')) else { continue };
        let line_before = code[..at].rsplit('\n').next().unwrap_or_default();
        let is_item = line_before.trim().is_empty() && head.starts_with([' ', '<']);
        if let Some(generics) = head.strip_prefix('<') {
            head = list_items(generics).1;
        }
        let start = at + open;
        let head = &head[..head.len().saturating_sub(code.len() - start)];
        let (true, Some((path, _))) = (is_item, head.split_once(" for ")) else { continue };
        let path = path.split('<').next().unwrap_or_default().trim();
        let name = path.rsplit("::").next().unwrap_or_default().to_owned();
        found.push(Block { name, start, end: closing_brace(code, start) });
    }
    found
}

/// The items of a list, which begins after its bracket, and the text after the list.
fn list_items(list: &str) -> (Vec<&str>, &str) {
    let (mut items, mut depth, mut start, mut end) = (Vec::new(), 0, 0, list.len());
    for (at, c) in list.char_indices() {
        match c {
            '(' | '[' | '{' | '<' => depth += 1,
            '>' if list[..at].ends_with('-') => {} // an arrow
            ')' | ']' | '}' | '>' if depth == 0 => {
                end = at;
                break;
            }
            ')' | ']' | '}' | '>' => depth -= 1,
            ',' if depth == 0 => {
                items.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    items.push(&list[start..end]);
    items.retain(|item| !item.trim().is_empty());
    (items, list.get(end + 1..).unwrap_or_default())
}

/// `self`, `&mut self`, `self: Box<Self>`
fn is_receiver(parameter: &str) -> bool {
    let pattern = parameter.split(':').next().unwrap_or_default();
    pattern.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "self")
}

/// Each leaf of each `use` declaration, with the declaration's offset.
fn use_trees(code: &str) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("use ") {
        let before = code[..at].trim_end_matches([' ', '\t']);
        let starts = before.is_empty()
            || before.ends_with(['\n', ';', '{', '}'])
            || before.ends_with("pub")
            || before.ends_with(')');
        if let (true, Some(end)) = (starts, code[at..].find(';')) {
            leaves(&code[at + 4..at + end], &[], &mut |segments| found.push((at, segments)));
        }
    }
    found
}

fn leaves(tree: &str, prefix: &[String], take: &mut dyn FnMut(Vec<String>)) {
    let tree = tree.trim();
    let segments = |text: &str| {
        let text = text.split(" as ").next().unwrap_or_default();
        let names = text.split("::").map(str::trim).filter(|name| !name.is_empty());
        names.map(str::to_owned).collect::<Vec<_>>()
    };
    let Some(open) = tree.find('{') else {
        let mut all = prefix.to_vec();
        all.extend(segments(tree));
        if all.last().is_some_and(|last| last == "self") && all.len() > 1 {
            all.pop();
        }
        return take(all);
    };
    let mut head = prefix.to_vec();
    head.extend(segments(&tree[..open]));
    let inner = &tree[open + 1..tree.rfind('}').unwrap_or(tree.len())];
    let (mut depth, mut start) = (0, 0);
    for (at, c) in inner.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                leaves(&inner[start..at], &head, take);
                start = at + 1;
            }
            _ => {}
        }
    }
    if !inner[start..].trim().is_empty() {
        leaves(&inner[start..], &head, take);
    }
}

/// Paths of at least two segments in code, with their offsets.
fn inline_paths(code: &str) -> Vec<(usize, Vec<String>)> {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(offset) = code[at..].find(|c: char| c.is_alphabetic() || c == '_') {
        let start = at + offset;
        let end = code[start..].find(|c: char| !is_name(c) && c != ':').map_or(code.len(), |end| start + end);
        at = end.max(start + 1);
        let continues = code[..start].ends_with(|c: char| is_name(c) || [':', '.', '$', '\''].contains(&c));
        let segments: Vec<String> = code[start..end].split("::").map(str::to_owned).collect();
        if !continues && segments.len() > 1 && segments.iter().all(|name| name.chars().all(is_name)) {
            found.push((start, segments));
        }
    }
    found
}

/// A cycle, its first module repeated at its end.
fn find_cycle(graph: &BTreeMap<ModulePath, BTreeMap<ModulePath, usize>>) -> Option<Vec<ModulePath>> {
    fn visit(
        graph: &BTreeMap<ModulePath, BTreeMap<ModulePath, usize>>,
        at: &ModulePath,
        way: &mut Vec<ModulePath>,
        done: &mut BTreeSet<ModulePath>,
    ) -> Option<Vec<ModulePath>> {
        if let Some(start) = way.iter().position(|module| module == at) {
            return Some(way[start..].iter().chain([at]).cloned().collect());
        }
        if !done.insert(at.clone()) {
            return None;
        }
        way.push(at.clone());
        let next = graph.get(at).into_iter().flat_map(BTreeMap::keys);
        let cycle = next.into_iter().find_map(|next| visit(graph, next, way, done));
        way.pop();
        cycle
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|module| visit(graph, module, &mut Vec::new(), &mut done))
}
