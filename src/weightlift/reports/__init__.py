"""What people read: tables and progress, made from finished records; nothing here loads or measures anything."""
