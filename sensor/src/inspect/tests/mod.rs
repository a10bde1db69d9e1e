mod rules;
mod scanning;
