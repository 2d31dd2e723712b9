#[hopline::event]
struct Plain {
    id: u64,
}

#[hopline::event(version = 2)]
struct Versioned {
    id: u64,
}

fn main() {}
