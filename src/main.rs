//! The binary: arguments to one subcommand to one message and exit code.

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    preface::cli::main()
}
