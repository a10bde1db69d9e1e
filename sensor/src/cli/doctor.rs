//! `mcp-sensor doctor`.

use super::output::{self, Table};
use super::{DoctorArgs, Exit, Output};
use crate::event::pb::HookStatus;
use crate::event::text::escape;
use crate::kernel::doctor::{Check, report};
use serde_json::{Value, json};
use std::process::ExitCode;

pub(super) fn run(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let checks = report(args.cgroup.as_deref())?;
    match args.output.output {
        Output::Json => output::json(&json_of(&checks))?,
        Output::Table => print(&checks)?,
    }
    let missing = checks.iter().any(|c| c.required && c.status == HookStatus::NotEnforced);
    Ok(if missing { Exit::Prerequisite } else { Exit::Ok }.into())
}

/// As `-o json` prints them.
pub(super) fn checks() -> anyhow::Result<Value> {
    Ok(json_of(&report(None)?))
}

fn json_of(checks: &[Check]) -> Value {
    checks.iter().map(to_json).collect()
}

fn status_name(status: HookStatus) -> &'static str {
    match status {
        HookStatus::Attached => "works",
        HookStatus::Fallback => "fallback",
        HookStatus::NotEnforced => "not_enforced",
        HookStatus::Unspecified => "unknown",
    }
}

fn to_json(check: &Check) -> Value {
    json!({
        "name": check.name, "status": status_name(check.status), "required": check.required,
        "detail": check.detail, "fix": check.fix,
    })
}

fn print(checks: &[Check]) -> anyhow::Result<()> {
    let mut table = Table::new(["CHECK", "STATUS", "NEED", "DETAIL"]);
    for check in checks {
        let required = if check.required { "required" } else { "optional" };
        let mut detail = escape(&check.detail);
        if !check.fix.is_empty() {
            detail.push_str(&format!("; {}", escape(&check.fix)));
        }
        table.row([escape(&check.name), status_name(check.status).to_owned(), required.to_owned(), detail]);
    }
    table.print()
}
