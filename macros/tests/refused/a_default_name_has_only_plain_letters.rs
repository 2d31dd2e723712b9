#[hopline::service]
trait Größe {
    async fn länge(&self);
}

fn main() {}
