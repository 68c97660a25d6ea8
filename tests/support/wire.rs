//! Golden messages of `config/wire`: what every kind of message looks like. `UPDATE_GOLDEN=1`
//! rewrites those that the project writes itself; the difference is then for the reviewer.

#![allow(dead_code, clippy::unwrap_used)] // each test program uses a part of it

use std::path::PathBuf;

use serde_json::Value;

/// Where a golden message lies.
pub fn path(name: &str) -> PathBuf {
    let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = here.ancestors().take(2).find(|dir| dir.join("config/wire").is_dir()).unwrap();
    root.join("config/wire").join(name)
}

/// The bytes of a golden message, without the line end of the file.
pub fn read(name: &str) -> Vec<u8> {
    let path = path(name);
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    bytes.trim_ascii_end().to_vec()
}

/// A golden message as a JSON value.
pub fn json(name: &str) -> Value {
    serde_json::from_slice(&read(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Compares bytes that were written with a golden message.
#[track_caller]
pub fn check(name: &str, written: &[u8]) {
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path(name), [written, b"\n"].concat()).unwrap();
    }
    let (written, golden) = (String::from_utf8_lossy(written), read(name));
    assert_eq!(written, String::from_utf8_lossy(&golden), "{name}; UPDATE_GOLDEN=1 rewrites it");
}

/// Compares JSON that was written with a golden message, which is kept in a form for people.
#[track_caller]
pub fn check_json(name: &str, written: &[u8]) {
    let written: Value = serde_json::from_slice(written).unwrap();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        let text = serde_json::to_string_pretty(&written).unwrap();
        std::fs::write(path(name), format!("{text}\n")).unwrap();
    }
    assert_eq!(written, json(name), "{name}; UPDATE_GOLDEN=1 rewrites it");
}

/// Names of all golden messages, sorted. What lies beside their folders is none.
pub fn names() -> Vec<String> {
    let mut names = Vec::new();
    let entries = std::fs::read_dir(path("")).unwrap().map(|entry| entry.unwrap().path());
    for dir in entries.filter(|path| path.is_dir()) {
        for file in dir.read_dir().unwrap() {
            let (dir, file) = (dir.file_name().unwrap(), file.unwrap().file_name());
            names.push(format!("{}/{}", dir.to_str().unwrap(), file.to_str().unwrap()));
        }
    }
    names.sort();
    names
}
