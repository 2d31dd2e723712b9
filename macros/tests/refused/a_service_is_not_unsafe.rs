#[hopline::service]
unsafe trait Demo {
    async fn put(&self);
}

fn main() {}
