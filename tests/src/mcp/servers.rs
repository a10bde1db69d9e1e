//! The real servers, what each is asked, and how a policy knows it; and the
//! two of the tests' own.

use super::session::Session;
use crate::bed::Bed;
use crate::drivers::{found, installed};
use crate::policy::Policy;
use crate::run::Running;
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub struct Server {
    /// Its name in the policy.
    pub name: &'static str,
    /// What its package is called; empty for the tests' own.
    pub package: &'static str,
    /// File that its interpreter runs.
    script: String,
    pub session: Session,
}

impl Server {
    fn new(name: &'static str, package: &'static str, script: &str, session: Session) -> Server {
        Server { name, package, script: script.to_owned(), session }
    }

    /// Recorded, never denied.
    pub fn declared(&self, policy: Policy) -> Policy {
        let script = format!("{{script: {}}}", self.script);
        let rule = match self.package {
            "" => format!("match: [{script}]"),
            package => format!("match: [{{package: \"{package}\"}}, {script}]"),
        };
        policy.server(self.name, "unrestricted", "audit", &rule)
    }
}

/// A server of `tests/servers`.
pub fn own(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("servers").join(name)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn node(bin: &str) -> Result<String> {
    Ok(text(&installed("mcp-node")?.join("node_modules/.bin").join(bin)))
}

/// The folder of an npm package.
pub fn node_package(name: &str) -> Result<PathBuf> {
    Ok(installed("mcp-node")?.join("node_modules").join(name))
}

fn python(venv: &str, bin: &str) -> Result<String> {
    Ok(text(&installed(venv)?.join("bin").join(bin)))
}

pub fn everything() -> Result<Server> {
    let calls = json!([
        {"do": "tools"},
        {"do": "prompt", "name": "simple-prompt"},
        {"do": "prompt", "name": "args-prompt", "arguments": {"city": "Oslo"}},
        {"do": "resource", "uri": "demo://resource/static/document/features.md"},
        {"tool": "echo", "arguments": {"message": ""}},
        {"tool": "echo", "arguments": {"message": "ünïcödé \u{1f980} \"quoted\"\\\n"}},
        {"tool": "get-sum", "arguments": {"a": 1, "b": 2}},
        {"tool": "get-sum", "arguments": {"a": "one"}},
        {"tool": "no-such-tool"},
        {"tool": "get-tiny-image"},
        {"tool": "get-resource-links", "arguments": {"count": 3}},
        {"tool": "get-structured-content", "arguments": {"location": "Chicago"}},
        {"tool": "trigger-long-running-operation", "arguments": {"duration": 0.4, "steps": 4}, "progress": true},
        {"tool": "trigger-long-running-operation", "arguments": {"duration": 60, "steps": 2}, "cancel_after": 0.2},
    ]);
    let many = json!([{"tool": "echo", "arguments": {"message": "again"}, "times": 200}]);
    let phases = json!([{"calls": calls}, {"concurrency": 50, "calls": many}]);
    let session = Session::new(vec![node("mcp-server-everything")?], phases);
    Ok(Server::new("everything", "@modelcontextprotocol/server-everything", "mcp-server-everything", session))
}

pub fn filesystem(bed: &Bed) -> Result<Server> {
    let folder = bed.folder.path().join("files");
    std::fs::create_dir_all(&folder)?;
    let (file, missing) = (text(&folder.join("a.txt")), text(&folder.join("missing")));
    let calls = json!([
        {"do": "tools"},
        {"tool": "write_file", "arguments": {"path": file, "content": "line\n".repeat(200_000)}},
        {"tool": "read_text_file", "arguments": {"path": file}},
        {"tool": "read_text_file", "arguments": {"path": file, "head": 1}},
        {"tool": "read_text_file", "arguments": {"path": missing}},
        {"tool": "read_text_file", "arguments": {"path": "/etc/passwd"}},
        {"tool": "list_directory", "arguments": {"path": folder}},
        {"tool": "get_file_info", "arguments": {"path": file}},
        {"tool": "edit_file", "arguments": {"path": file, "edits": []}},
    ]);
    let many = json!([{"tool": "get_file_info", "arguments": {"path": file}, "times": 30}]);
    let phases = json!([{"calls": calls}, {"concurrency": 10, "calls": many}]);
    let session = Session::new(vec![node("mcp-server-filesystem")?, text(&folder)], phases);
    Ok(Server::new("filesystem", "@modelcontextprotocol/server-filesystem", "mcp-server-filesystem", session))
}

/// Its service is out of reach: calls fail, which is an outcome, too.
pub fn context7() -> Result<Server> {
    let calls = json!([
        {"do": "tools"},
        {"tool": "resolve-library-id", "arguments": {"query": "timers", "libraryName": "tokio"}},
        {"tool": "query-docs", "arguments": {"libraryId": "/tokio-rs/tokio"}},
        {"tool": "no-such-tool"},
    ]);
    let mut session = Session::new(vec![node("context7-mcp")?], json!([{"calls": calls}]));
    session.env = vec![("CONTEXT7_API_URL".into(), "http://127.0.0.1:9/api".into())];
    Ok(Server::new("context7", "@upstash/context7-mcp", "context7-mcp", session))
}

pub fn notion() -> Result<Server> {
    let calls = json!([
        {"do": "tools"},
        {"tool": "API-get-self"},
        {"tool": "API-post-search", "arguments": {"query": "plans"}},
        {"tool": "API-no-such-tool"},
    ]);
    let mut session = Session::new(vec![node("notion-mcp-server")?], json!([{"calls": calls}]));
    session.env =
        vec![("NOTION_TOKEN".into(), "ntn_none".into()), ("BASE_URL".into(), "http://127.0.0.1:9".into())];
    Ok(Server::new("notion", "@notionhq/notion-mcp-server", "notion-mcp-server", session))
}

/// `url`: a page that it can fetch.
pub fn fetch(url: &str) -> Result<Server> {
    let calls = json!([
        {"do": "tools"},
        {"tool": "fetch", "arguments": {"url": url}},
        {"tool": "fetch", "arguments": {"url": url, "raw": true}},
        {"tool": "fetch", "arguments": {"url": "http://127.0.0.1:9/"}},
        {"tool": "fetch", "arguments": {}},
    ]);
    let command = vec![
        python("mcp-v2", "mcp-server-fetch")?,
        "--allow-private-ips".into(),
        "--ignore-robots-txt".into(),
    ];
    let session = Session::new(command, json!([{"calls": calls}]));
    Ok(Server::new("fetch", "mcp-server-fetch", "mcp-server-fetch", session))
}

pub fn git(bed: &Bed) -> Result<Server> {
    let folder = bed.folder.path().join("repository");
    if !folder.exists() {
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("file"), "content\n")?;
        let me = ["-c", "user.name=t", "-c", "user.email=t@example.test"];
        for arguments in [&["init", "-q"][..], &["add", "file"], &["commit", "-q", "-m", "first"]] {
            let mut git = bed.command(found("git").unwrap_or_else(|| "git".into()))?;
            git.current_dir(&folder).args(me).args(arguments);
            let done = Running::start(git)?.finish(Duration::from_secs(20))?;
            ensure!(done.status.success(), "git {arguments:?}: {}", done.stderr);
        }
    }
    let repository = json!({"repo_path": folder});
    let calls = json!([
        {"do": "tools"},
        {"tool": "git_status", "arguments": repository},
        {"tool": "git_log", "arguments": repository},
        {"tool": "git_show", "arguments": {"repo_path": folder, "revision": "HEAD"}},
        {"tool": "git_show", "arguments": {"repo_path": folder, "revision": "nothing"}},
        {"tool": "git_status", "arguments": {"repo_path": "/nowhere"}},
    ]);
    let command = vec![python("mcp-v2", "mcp-server-git")?, "-r".into(), text(&folder)];
    let session = Session::new(command, json!([{"calls": calls}]));
    Ok(Server::new("git", "mcp-server-git", "mcp-server-git", session))
}

pub fn time() -> Result<Server> {
    let calls = json!([
        {"do": "tools"},
        {"tool": "get_current_time", "arguments": {"timezone": "Etc/UTC"}},
        {"tool": "get_current_time", "arguments": {"timezone": "Mars/Olympus"}},
        {"tool": "convert_time", "arguments": {
            "source_timezone": "Europe/Oslo", "time": "12:30", "target_timezone": "Asia/Tokyo"}},
        {"tool": "convert_time", "arguments": {}},
    ]);
    let many = json!([{"tool": "get_current_time", "arguments": {"timezone": "Etc/UTC"}, "times": 100}]);
    let phases = json!([{"calls": calls}, {"concurrency": 50, "calls": many}]);
    let session = Session::new(vec![python("mcp-v2", "mcp-server-time")?], phases);
    Ok(Server::new("time", "mcp-server-time", "mcp-server-time", session))
}

pub fn sqlite(bed: &Bed) -> Result<Server> {
    let database = text(&bed.folder.path().join("data.db"));
    let calls = json!([
        {"do": "tools"},
        {"tool": "create_table", "arguments": {"query": "CREATE TABLE IF NOT EXISTS t (a INTEGER)"}},
        {"tool": "write_query", "arguments": {"query": "INSERT INTO t VALUES (1), (2)"}},
        {"tool": "read_query", "arguments": {"query": "SELECT a FROM t LIMIT 2"}},
        {"tool": "read_query", "arguments": {"query": "SELECT hex(randomblob(100000)) AS h"}},
        {"tool": "read_query", "arguments": {"query": "SELECT nothing"}},
        {"tool": "list_tables"},
        {"tool": "append_insight", "arguments": {"insight": "rows are few"}},
        {"do": "resource", "uri": "memo://insights"},
        {"do": "prompt", "name": "mcp-demo", "arguments": {"topic": "tea"}},
    ]);
    let command = vec![python("mcp-v1", "mcp-server-sqlite")?, "--db-path".into(), database];
    let session = Session::new(command, json!([{"calls": calls}]));
    Ok(Server::new("sqlite", "mcp-server-sqlite", "mcp-server-sqlite", session))
}

/// `echo.py` with `arguments`; a copy whose name no other test's policy knows.
pub fn echo_python(bed: &Bed, phases: Value, arguments: &[&str]) -> Result<Server> {
    copied(bed, "echo-py", "echo.py", "python3", phases, arguments)
}

pub fn echo_node(bed: &Bed, phases: Value) -> Result<Server> {
    copied(bed, "echo-js", "echo.mjs", "node", phases, &[])
}

fn copied(
    bed: &Bed,
    name: &'static str,
    file: &str,
    interpreter: &str,
    phases: Value,
    arguments: &[&str],
) -> Result<Server> {
    let unique = bed.folder.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
    let script = format!("{unique}-{file}");
    let copy = bed.folder.path().join(&script);
    std::fs::copy(own(file), &copy)?;
    let mut command = vec![text(&found(interpreter).unwrap_or_else(|| interpreter.into())), text(&copy)];
    command.extend(arguments.iter().map(|a| (*a).to_owned()));
    Ok(Server::new(name, "", &script, Session::new(command, phases)))
}
