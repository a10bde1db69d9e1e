fn main() -> std::process::ExitCode {
    mcp_sensor::cli::main()
}
